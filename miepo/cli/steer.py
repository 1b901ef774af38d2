"""``miepo steer --ckpt_path RUN [--port 7860]``."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from miepo.cli.quiet import quiet
from miepo.cli.serve import add_options, check_options
from miepo.errors import UserError

ANSWERS = 2  # to one visitor, side by side


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo steer", description="A local page that steers a trained policy between its objectives."
    )
    add_options(parser, 7860)
    return parser


def main(args: Sequence[str]) -> None:
    """Show a trained policy."""
    options = make_parser().parse_args(args)
    check_options(options)
    if options.max_tokens < 2:
        raise UserError(f"--max_tokens: expected at least 2, between which to choose, got {options.max_tokens}")
    if options.max_queue < ANSWERS:
        raise UserError(
            f"--max_queue: expected at least {ANSWERS}, the answers of one visitor, got {options.max_queue}"
        )
    quiet()
    from miepo.serving.steer import steer

    steer(options)
