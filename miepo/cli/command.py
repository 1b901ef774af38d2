"""The command: ``miepo fit | validate | test | predict | ..``, and mistakes in one sentence."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from miepo.cli.normalise import normalise
from miepo.cli.trainer import LogConfig, MiepoCLI
from miepo.errors import UserError, first_line
from miepo.resources import is_file

DESCRIPTION = (
    "Train and use a policy for every trade-off between objectives. Beside the subcommands below: miepo normalise "
    "measures the normalisation of rewards on offline data; miepo report writes a page about runs; miepo steer shows a "
    "trained policy on a local page, miepo serve answers OpenAI's chat requests with it, miepo export writes it as a "
    "PEFT adapter or a whole model."
)


# loaded when they are asked for
COMMANDS = {
    "export": "miepo.trained.export",
    "report": "miepo.report.command",
    "serve": "miepo.serving.command",
    "steer": "miepo.serving.steer",
}


def main(args: ArgsType = None) -> None:
    """The command. A user's mistake ends in one sentence and exit status 2; ``MIEPO_TRACEBACK=1`` shows where."""
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the user's own objectives, beside the configuration
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # prompts are in memory
    warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # whole batches; no one asks which rows
    quiet()
    given = sys.argv[1:] if args is None else args
    MiepoCLI.began = False
    command = given[0] if isinstance(given, list) and given else None
    try:
        if isinstance(given, list):
            check_yaml(given)
        if isinstance(given, list) and given[:1] == ["normalise"]:
            normalise(given[1:])
            return
        if isinstance(given, list) and command in COMMANDS:
            import_module(COMMANDS[command]).main(given[1:])
            return
        MiepoCLI(
            save_config_callback=LogConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"description": DESCRIPTION},
            args=args,
        )
    except Exception as error:
        mistake: object = user_error(error) or outer_mistake(error)
        if mistake is None and not MiepoCLI.began and command not in COMMANDS:
            mistake = f"expected a configuration that can be built, got {type(error).__name__}: {first_line(error)}"
        if mistake is None or os.environ.get("MIEPO_TRACEBACK"):
            raise
        print(f"miepo: error: {mistake}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """Keeps other libraries' deprecations, advertisements and bars of converters out of the output."""
    for message in (".*`is_gradient_checkpointing` is deprecated.*", ".*LeafSpec.*"):  # peft, lightning
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(f, _Unasked) for f in lightning_log.filters):
        lightning_log.addFilter(_Unasked())


class _Unasked(logging.Filter):
    """Drops what Lightning says of products and of devices that nobody asked for."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage() and not record.getMessage().startswith("TPU available")


def check_yaml(args: Sequence[str]) -> None:
    """Refuses a configuration file in which something contains itself, or in which a key stands twice.

    Whoever walks through the one does not come back; of the other the parser would drop the first without a word.
    """
    files = [b for a, b in pairwise(args) if a == "--config"]
    files += [a.removeprefix("--config=") for a in args if a.startswith("--config=")]
    for file in files:
        if not is_file(Path(file)):  # a pipe can be read once, by the parser
            continue
        try:
            root = yaml.compose(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue  # the parser says what it is
        open_nodes: set[int] = set()
        closed: set[int] = set()  # what is referred to many times is looked at once
        walk = [(root, False)]
        while walk:
            node, left = walk.pop()
            if left:
                open_nodes.discard(id(node))
                closed.add(id(node))
            elif id(node) in open_nodes:
                raise UserError(f"expected a configuration in '{file}', got one in which something contains itself")
            elif isinstance(node, yaml.CollectionNode) and id(node) not in closed:
                open_nodes.add(id(node))
                if isinstance(node, yaml.MappingNode):
                    _refuse_repeated(node, file)
                inside = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
                walk += [(node, True), *((n, False) for n in inside)]


def _refuse_repeated(node: yaml.MappingNode, file: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (first := lines.setdefault(key.value, line)) != line:
            raise UserError(f"'{file}' has the key '{key.value}' in lines {first} and {line}: expected it once")


def user_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an exception: the parser wraps what a constructor raises in errors of its own."""
    while error is not None and not isinstance(error, (UserError, MisconfigurationException)):
        error = error.__cause__ or error.__context__
    return error


def outer_mistake(error: BaseException) -> str | None:
    """What is to be said of an error that the machine or a library gives a reason for, which the user can mend."""
    if isinstance(error, OSError) and error.strerror:
        path = f", got '{error.filename}'" if error.filename else ""
        return f"expected paths that can be read and written{path}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device's memory is spent: expected smaller batches (data.batch_size, data.evaluation_batch_size), "
            "shorter responses or a smaller policy.max_tokens_per_micro_batch; python -m tools.memory tells beforehand"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return f"trainer.callbacks EarlyStopping: {first_line(error)}"
    return None


if __name__ == "__main__":
    main()
