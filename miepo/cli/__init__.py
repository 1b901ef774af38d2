"""The command ``miepo``."""

from miepo.cli.command import main

__all__ = ["main"]
