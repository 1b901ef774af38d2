"""The command ``miepo``: which commands there are, and mistakes in one sentence.

What this module and the parsers of :mod:`miepo.cli` import is light, so that help comes at once. Torch, Lightning and
Transformers take seconds and are imported by the command that needs them.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from miepo import __version__
from miepo.cli.configurations import check_yaml, find_configurations
from miepo.cli.mistakes import outer_mistake, user_error
from miepo.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

# Lightning's, whose parser takes a configuration
TRAINER_COMMANDS = {
    "fit": "train a policy",
    "validate": "evaluate a policy along the grid of preferences",
    "test": "evaluate a policy as validate does, by Lightning's test loop",
    "predict": "answer prompts under given preferences, into a file",
}
# each is a module of miepo.cli with make_parser() and main(args)
OTHER_COMMANDS = {
    "init": "write a commented configuration for your own model and prompts",
    "objectives": "list the objectives, those of other packages too",
    "normalise": "measure the normalisation of rewards on offline data",
    "report": "write a page about one or several runs",
    "steer": "show a trained policy on a page with a slider for each objective",
    "serve": "answer OpenAI's chat requests with a trained policy",
    "rollout-server": "print or run the line that starts a vLLM server",
    "export": "write a trained policy as a PEFT adapter or a whole model",
    "completion": "print a script that completes commands in your shell",
}
COMMANDS = TRAINER_COMMANDS | OTHER_COMMANDS


def main(args: ArgsType = None) -> None:
    """Run a command. A user's mistake ends in one sentence and exit status 2; ``MIEPO_TRACEBACK=1`` shows where."""
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the user's own objectives, beside the configuration
    words = sys.argv[1:] if args is None else args
    try:
        if isinstance(words, list):
            _dispatch(words)
        else:
            _train(words)
    except Exception as error:
        mistake: object = user_error(error) or outer_mistake(error)
        if mistake is None or os.environ.get("MIEPO_TRACEBACK"):
            raise
        print(f"miepo: error: {mistake}", file=sys.stderr)
        sys.exit(2)


def module_of(command: str) -> ModuleType:
    """Return the module of one of :data:`OTHER_COMMANDS`."""
    return import_module(f"miepo.cli.{command.replace('-', '_')}")


def make_parser() -> ArgumentParser:
    """Make the parser that shows all commands; each has another for its own options."""
    lines = [f"  {name:16}{line}" for name, line in COMMANDS.items()]
    parser = ArgumentParser(
        prog="miepo",
        usage="miepo COMMAND ... | --help | --version",
        description="Trains and uses one language-model policy for every trade-off between objectives.",
        epilog="\n".join(["commands:", *lines, "", "miepo COMMAND --help shows the options of a command."]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"miepo {__version__}")
    return parser


def _dispatch(args: Sequence[str]) -> None:
    """Run the command that a command line names first."""
    command = args[0] if args else ""
    if command in ("-h", "--help", "--version"):
        make_parser().parse_args([command])
    args = find_configurations(args)
    check_yaml(args)
    if command in OTHER_COMMANDS:
        module_of(command).main(args[1:])
    elif command in TRAINER_COMMANDS or command.startswith("-"):  # Lightning takes options before the command, too
        _train(args)
    else:
        got = f"'{command}'" if args else "none"
        raise UserError(f"expected a command ({', '.join(COMMANDS)}), got {got}")


def _train(args: ArgsType) -> None:
    from miepo.cli.trainer import train

    train(args)


if __name__ == "__main__":
    main()
