"""``miepo report RUN [RUN ...] --out report.html``."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo report",
        description="Writes one HTML page, which needs no network, about one or several runs, finished or not: their "
        "figures before and after with intervals, fronts, training curves, rewards and answers under every preference.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder: runs/quickstart/version_0")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; what is there is replaced")
    parser.add_argument("--prompts", type=int, default=4, help="show the answers to this many prompts (default: 4)")
    return parser


def main(args: Sequence[str]) -> None:
    """Write a report about runs."""
    options = make_parser().parse_args(args)
    from miepo.report.page import report

    path = report(options.runs, options.prompts).save(options.out)
    print(f"Report: {path}")
