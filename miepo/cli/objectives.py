"""``miepo objectives``: what objectives there are."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from typing import Any

from miepo.cli.quiet import quiet
from miepo.errors import first_line
from miepo.plugins import OBJECTIVES, plugins, said_of


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    return ArgumentParser(
        prog="miepo objectives",
        description="Lists the objectives with the class path that a configuration names, those of other packages too: "
        f"of each entry point in the group '{OBJECTIVES}'. The name of a class alone is enough where no other has it: "
        "class_path: Brevity. miepo fit --objectives.help CLASS_PATH shows what one is built with.",
    )


def main(args: Sequence[str]) -> None:
    """Print the list."""
    make_parser().parse_args(args)
    quiet()
    rows = [*_built_in(), *_of_other_packages()]
    width = max(len(path) for path, _ in rows)
    for path, line in rows:
        print(f"{path:{width}}  {line}")


def _built_in() -> Iterator[tuple[str, str]]:
    import miepo.objectives

    for name in miepo.objectives.__all__:
        found = getattr(miepo.objectives, name)
        if not any(getattr(getattr(found, part), "__isabstractmethod__", False) for part in dir(found)):
            yield f"miepo.objectives.{name}", first_sentence(found)


def _of_other_packages() -> Iterator[tuple[str, str]]:
    from miepo.objectives import Objective

    for entry in plugins(OBJECTIVES):
        path = entry.value.replace(":", ".")
        try:
            found: Any = entry.load()
        except Exception as error:  # whatever the other package's code raises
            yield path, f"{said_of(entry)} cannot be imported: {first_line(error)}"
            continue
        if isinstance(found, type) and issubclass(found, Objective):
            yield path, first_sentence(found)
        else:
            yield path, f"{said_of(entry)}: expected a subclass of miepo.Objective, got {found!r}"


def first_sentence(documented: type) -> str:
    """Return the first sentence of a class's docstring, without markup.

    >>> first_sentence(type("X", (), {"__doc__": "The share of ``!``, by :class:`~re.Pattern`. Slow."}))
    'The share of !, by re.Pattern.'
    """
    paragraph = " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    return re.sub(r"(?::[\w:]+:)?`+~?([^`]*)`+", r"\1", sentence)
