"""``miepo steer --ckpt_path RUN [--port 7860]``."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from miepo.cli.quiet import quiet
from miepo.cli.serve import add_options, check_options
from miepo.errors import UserError

ANSWERS = 2  # to one visitor, side by side


def make_parser() -> ArgumentParser:
    """Makes the parser of the command."""
    parser = ArgumentParser(
        prog="miepo steer", description="A local page that steers a trained policy between its objectives."
    )
    add_options(parser, 7860)
    return parser


def main(args: Sequence[str]) -> None:
    """Shows a trained policy."""
    options = make_parser().parse_args(args)
    check_options(options)
    if options.most_tokens < 2:
        raise UserError(f"--most_tokens: expected at least 2, between which to choose, got {options.most_tokens}")
    if options.waiting < ANSWERS:
        raise UserError(f"--waiting: expected at least {ANSWERS}, the answers of one visitor, got {options.waiting}")
    quiet()
    from miepo.serving.steer import steer

    steer(options)
