"""Objectives and callbacks of other packages, which their entry points name.

A package that declares ``[project.entry-points."miepo.objectives"]`` with ``Politeness = "polite:Politeness"`` has its
class listed by ``miepo objectives``; a configuration names it by ``class_path: Politeness``.
"""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint, entry_points

from miepo.errors import first_line

OBJECTIVES = "miepo.objectives"
CALLBACKS = "miepo.callbacks"


def plugins(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, by name; a distribution that is found twice counts once."""
    return sorted(set(entry_points(group=group)), key=lambda entry: (entry.name, entry.value))


def load_plugins() -> None:
    """Import the classes of other packages, so that the parser knows them by their names alone.

    One that cannot be imported is told in a warning: a run that does not use it goes on.
    """
    for group in (OBJECTIVES, CALLBACKS):
        for entry in plugins(group):
            try:
                entry.load()
            except Exception as error:  # whatever the other package's code raises
                warnings.warn(f"{said_of(entry)} cannot be imported: {first_line(error)}", stacklevel=2)


def said_of(entry: EntryPoint) -> str:
    """Say which entry point it is, and of which package."""
    package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
    return f"'{entry.name} = {entry.value}'{package}"
