"""Errors that a user can mend. The command line prints their one sentence and exits with status 2."""

from __future__ import annotations

from traceback import extract_tb
from typing import Any


class UserError(Exception):
    """Something the user gave cannot be used: the message says what was expected and what came."""


class ObjectiveError(UserError):
    """An objective failed to load or to score; the message names the objective."""


class NoBase(UserError):
    """There is no base model where it is said to be."""


def needs(package: str, user: str) -> UserError:
    """Return the error for an optional package that is not installed."""
    return UserError(f"{user} needs the package '{package}', which is not installed: pip install {package}")


def load_reason(error: BaseException) -> str:
    """Say why a library could not load a model or tokenizer, as the end of a sentence."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which miepo does not execute"
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return kind + first_line(error)


def invalid(error: Any) -> str:
    """Say in one sentence what pydantic found first: ``expected position to be a valid integer, got 'three'``."""
    if not hasattr(error, "errors"):
        return first_line(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "it"
    if first["type"] == "missing":
        return f"expected {where}, got none"
    requirement = first["msg"].removeprefix("Input should ")
    return f"expected {where} {'to ' if requirement != first['msg'] else ''}{requirement}, got {short(first['input'])}"


def short(value: object) -> str:
    """Return a value as a message shows it, a number of thousands of digits, too."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"
    return cut(text)


def cut(text: str) -> str:
    """Return a text as long as a message has room for."""
    return text if len(text) <= 80 else f"{text[:80]}.."


def place_of(error: BaseException) -> tuple[str, int] | None:
    """Return file and line where an error was raised, or where a library was called that raised it."""
    frames = [frame for frame in extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else None


def first_line(error: BaseException) -> str:
    """Return what a library says of a mistake, in one line; where its first only announces the next, both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
