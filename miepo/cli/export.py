"""``miepo export --ckpt_path RUN --out FOLDER [--preference JSON] [--merged]``."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from miepo.cli.quiet import quiet
from miepo.errors import UserError


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo export",
        description="Writes a trained policy as a PEFT adapter or a whole model, which need no miepo.",
    )
    parser.add_argument("--ckpt_path", required=True, help="a run's folder or a checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--preference", help="weights by objective name as JSON; without it, the whole simplex")
    parser.add_argument("--merged", action="store_true", help="a complete model in place of an adapter")
    parser.add_argument("--base", help="where the base model is, if not where it was in training")
    parser.add_argument("--trust", action="store_true", help="import code that the checkpoint names and miepo has not")
    return parser


def main(args: Sequence[str]) -> None:
    """Export a trained policy."""
    options = make_parser().parse_args(args)
    preference = None if options.preference is None else read_preference(options.preference)
    quiet()
    from miepo.trained.export import export
    from miepo.trained.saved import Saved

    saved = Saved.read(options.ckpt_path)
    folder = export(saved, options.out, preference, options.merged, options.trust, options.base)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Exported {size / 1e6:.1f} MB: {folder}")


def read_preference(text: str) -> dict[str, float]:
    """Read weights by objective name from a command line's JSON."""
    try:
        weights = json.loads(text)
    except ValueError:
        weights = None
    if not isinstance(weights, dict):
        raise UserError(f'expected a preference such as \'{{"helpful": 0.7, "brief": 0.3}}\', got {text!r}')
    return weights
