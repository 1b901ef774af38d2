"""Text of models and users, made fit to be shown."""

from __future__ import annotations

from markupsafe import Markup

LIMIT = 2000
_CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {0x7F: 0x2421}


def visible(text: str) -> str:
    r"""Return the same text with control characters as pictures, and halves of characters as escapes.

    >>> visible("a\0b\ud800c\n")
    'a␀b\\ud800c\n'
    """
    return text.encode("utf-8", "backslashreplace").decode().translate(_CONTROLS)


def finished(value: object) -> object:
    """Return what a template writes for a value; jinja escapes it afterwards."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def shortened(text: str, limit: int = LIMIT) -> str:
    """At most ``limit`` characters, and how many more there are.

    >>> shortened("abcdef", 2)
    'ab … (4 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
