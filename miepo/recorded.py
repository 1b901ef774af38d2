"""Objects that know what they were built with, so that a checkpoint can say how to build them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, signature
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any


class Recorded:
    """Base class of what a configuration may name: it remembers the arguments of its constructor."""

    built_with: dict[str, Any]  # by name, defaults included

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments as they were given."""
        self = super().__new__(cls)
        noted: dict[str, Any] = {}
        with suppress(TypeError):  # a copy is made without any, and what __init__ does not take it says itself
            noted = arguments_of([kind for kind in cls.__mro__ if "__init__" in vars(kind)], args, kwargs)
        object.__setattr__(self, "built_with", noted)  # a module of torch is not ready for attributes yet
        return self


def arguments_of(kinds: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name, defaults included.

    What it takes as ``*args`` is named by the class that it inherits from, to which it passes them on.

    Args:
        kinds: The class and those it inherits from that have a constructor of their own.
        args: Given by position.
        kwargs: Given by name.

    Raises:
        TypeError: the constructor does not take them.
    """
    declared = signature(kinds[0].__init__)  # type: ignore[misc]
    bound = declared.bind(None, *args, **kwargs)
    bound.apply_defaults()
    noted: dict[str, Any] = {}
    passed_on: tuple[Any, ...] = ()
    others: dict[str, Any] = {}
    for name, value in [*bound.arguments.items()][1:]:
        kind = declared.parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            passed_on = value
        elif kind is Parameter.VAR_KEYWORD:
            others = value
        else:
            noted[name] = value
    if passed_on and len(kinds) > 1:
        with suppress(TypeError):  # it may do something else with them
            others = arguments_of(kinds[1:], passed_on, others)
    return noted | others


def import_path(kind: Any) -> str:
    """Return the name under which a class or function is imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


def without_prompts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with lists of prompts, which may be very many, as ``'8 prompts'``."""
    return {
        name: f"{len(value)} prompts" if isinstance(value, list) and "prompts" in name else value
        for name, value in arguments.items()
    }


def specification(value: Any) -> Any:
    """State a value as a configuration does: ``class_path`` and ``init_args`` of what records its constructor.

    Classes and functions become their import paths, paths become text. Of what has no such form the import path of its
    class is all that is kept.
    """
    if isinstance(value, Recorded):
        arguments = {name: specification(argument) for name, argument in value.built_with.items()}
        return {"class_path": import_path(type(value)), "init_args": arguments}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): specification(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [specification(entry) for entry in value]
    if isinstance(value, PathLike):
        return str(fspath(value))
    return import_path(value if hasattr(value, "__qualname__") else type(value))
