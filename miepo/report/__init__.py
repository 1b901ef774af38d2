"""A report about runs: one HTML page that needs no network."""

from miepo.report.page import Report, report

__all__ = ["Report", "report"]
