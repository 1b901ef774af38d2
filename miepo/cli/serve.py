"""``miepo serve --ckpt_path RUN [--port 8000]``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from miepo.cli.quiet import quiet
from miepo.errors import UserError
from miepo.renamed import add_old_option

MOST_SECONDS = 86_400  # of one response


def add_options(parser: ArgumentParser, port: int) -> None:
    """Add what every command needs that shows a trained policy at an address."""
    parser.add_argument("--ckpt_path", required=True, help="a run's folder, a checkpoint or a folder of miepo export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; beyond this machine a key is needed")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--key", help="that a client must give; drawn where --host is not of this machine alone")
    parser.add_argument("--max_tokens", type=int, default=512, help="of a response")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a response is given up")
    parser.add_argument("--max_queue", type=int, default=64, help="requests that may wait; more are refused")
    for old, new in (("most_tokens", "max_tokens"), ("waiting", "max_queue")):
        add_old_option(parser, old, new)
    parser.add_argument("--base", help="where the base model is, if not where it was in training")
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("--trust", action="store_true", help="import code that the checkpoint names and miepo has not")


def check_options(options: Namespace) -> None:
    """Refuse what cannot be, before a model is loaded."""
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port: expected a number from 0 to 65535, got {options.port}")
    for name in ("max_tokens", "timeout", "max_queue"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    if options.timeout > MOST_SECONDS:
        raise UserError(f"--timeout: expected at most {MOST_SECONDS} seconds, got {options.timeout}")
    if options.key is not None and len(options.key) < 8:
        raise UserError(f"--key: expected at least 8 characters, got {len(options.key)}")
    if options.key is not None and not options.key.isascii():
        raise UserError("--key: expected ASCII characters, which are all that a header carries")


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo serve",
        description="Answers OpenAI's chat requests, which carry a preference: "
        'extra_body={"preference": {"helpful": 0.7, "brief": 0.3}}.',
    )
    add_options(parser, 8000)
    parser.add_argument("--name", default="miepo", help="of the model")
    parser.add_argument("--batch_size", type=int, default=16, help="requests that are answered together")
    return parser


def main(args: Sequence[str]) -> None:
    """Serve a trained policy."""
    options = make_parser().parse_args(args)
    check_options(options)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {options.batch_size}")
    quiet()
    from miepo.serving.command import serve

    serve(options)
