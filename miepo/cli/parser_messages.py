"""What the parser of a configuration says of a mistake, as one sentence.

jsonargparse writes an indented tree: a line for every setting and class on the way to the mistake, and of a type with
several forms what each of them lacks. The sentence names the setting, what was expected and what came.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from miepo.errors import cut, first_line
from miepo.plugins import CALLBACKS, OBJECTIVES, plugins

TRAINER = "lightning.pytorch.Trainer"
TOP = ["trainer", "model", "data", "objectives", "writer", "checkpoint", "record", "progress", "seed_everything"]
TOP += ["launcher", "ray"]
KEY = re.compile(r'Parser key "(.*)":$')
CLASS = re.compile(r"Problem with given class_path '(.*)':$")
SETTING = re.compile(r"Option '(.*)' is not accepted$")
GROUP = re.compile(r"(?:Group|Subcommand) '(.*)' does not accept option '(.*)'$")
TYPE = re.compile(r"Expected an? (.*?)(?:\. Got value: (.*))?$", re.DOTALL)
ATTRIBUTE = re.compile(r"module '(.*)' has no attribute '(.*)'$")
PATH = re.compile(r"Expected a path but (.*) either not accessible or invalid$")
MODULE = re.compile(r"No module named '(.*)'$")
SHORT = re.compile(r"Expected a dot import path string: (.*)$")


def one_sentence(message: str) -> str:
    """Return the mistake behind a message of jsonargparse."""
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in message.splitlines() if line.strip()]
    return _said(lines, [], None) if lines else message


def _said(lines: Sequence[tuple[int, str]], path: list[str], kind: str | None) -> str:
    """Say what a block of the tree says.

    Args:
        lines: Their indentation and text; the first is the head of the block.
        path: The settings on the way to it.
        kind: The class whose settings these are.
    """
    (_, head), *inside = lines
    head = head.removeprefix("- ")
    if (found := KEY.match(head)) and inside:
        return _said(inside, [*path, found[1]], kind)
    if (found := CLASS.match(head)) and inside:
        return _said(inside, path, found[1])
    if head.startswith("Does not validate against any of the Union subtypes") and inside:
        forms = _forms(inside)
        deep = max(forms, key=len)  # what came has this form, and a mistake inside
        if len(deep) > 1:
            return _said(deep, path, kind)
        wanted = [found[1] for (_, text), *_ in forms if (found := TYPE.match(text))]
        came = next((text.partition(": ")[2] for _, text in inside if text.startswith("Given value: ")), "another")
        return f"{_where(path)}expected {' or '.join(map(_type, wanted)) or 'another type'}, got {_value(came)}"
    if found := GROUP.match(head) or SETTING.match(head):
        setting = found[found.re.groups]
        if kind is None and (setting.startswith("trainer.") or "trainer" in found[1].split(".")):
            setting = setting.removeprefix("trainer.")
            return f"trainer has no setting '{setting}'{_alike(setting, _settings(TRAINER))}"
        known = TOP if kind is None else _settings(kind)
        owner = "the configuration" if kind is None else f"{_where(path)}{kind.rpartition('.')[2]}"
        return f"{owner} has no setting '{setting}'{_alike(setting.split('.')[0], known)}"
    if found := ATTRIBUTE.match(head):
        with suppress(ImportError):
            return f"{_where(path)}{_lacks(found[1], found[2])}"
    if found := MODULE.match(head):
        return f"{_where(path)}{_no_module(found[1])}"
    if (found := PATH.match(head)) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", found[1]):
        return f"{_where(path)}expected the import path of a class, got '{found[1]}'{_not_imported(found[1])}"
    if found := SHORT.match(head):
        return (
            f"{_where(path)}expected the import path of a class, or the name of an installed one, got '{found[1]}'"
            f"{_alike(found[1], _short_names())}"
        )
    if found := TYPE.match(head):
        came = "another" if found[2] is None else _value(found[2])
        return f"{_where(path)}expected {_type(found[1])}, got {came}"
    return f"{_where(path)}{head}"


def _forms(lines: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Return what is said of each form that a type has: the entries of the list below ``Errors:``."""
    start = next((i for i, (_, text) in enumerate(lines) if text == "Errors:"), None)
    if start is None:
        return [list(lines)]
    depth = lines[start + 1][0]
    forms: list[list[tuple[int, str]]] = []
    for indent, text in lines[start + 1 :]:
        if indent < depth:
            break
        if indent == depth and text.startswith("- "):
            forms.append([])
        if forms:
            forms[-1].append((indent, text.removeprefix("- ") if indent == depth else text))
    # no class at all, of which jsonargparse says at length what would be one
    return [form for form in forms if not form[0][1].startswith("Not a valid subclass")] or forms


def _where(path: Sequence[str]) -> str:
    return f"{'.'.join(path)}: " if path else ""


def _type(text: str) -> str:
    """Return a type as people write it.

    >>> _type("<class 'int'>"), _type("<class 'NoneType'>"), _type("typing.Literal['a', 'b']")
    ('int', 'null', "'a' or 'b'")
    """
    text = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*)\]", lambda found: found[1].replace(", ", " or "), text)
    return {"NoneType": "null", "tuple": "list"}.get(text, text)


def _value(text: str) -> str:
    return cut(text if text[:1] in "[{'\"" or text.replace(".", "").lstrip("-").isdigit() else f"'{text}'")


def _settings(path: str) -> list[str]:
    """Return the names of a class's settings; none where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        kind: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    found = [
        key
        for each in kind.__mro__
        if "__init__" in vars(each)
        for key, parameter in signature(each.__init__).parameters.items()
        if parameter.kind in named and key != "self"
    ]
    return [*dict.fromkeys(found)]


def _not_imported(path: str) -> str:
    """Return why there is no class at an import path."""
    module, _, name = path.rpartition(".")
    try:
        return f": {_lacks(module, name)}"
    except ModuleNotFoundError as error:
        return f": {_no_module(error.name or module)}"
    except Exception as error:
        return f": {first_line(error)}"


def _no_module(name: str) -> str:
    return f"there is no module {name}, neither in the current folder nor installed"


def _lacks(module: str, name: str) -> str:
    return f"{module} has no {name}{_alike(name, dir(import_module(module)))}"


def _short_names() -> list[str]:
    """Return the classes that a configuration may name without their modules."""
    named = [entry.name for group in (OBJECTIVES, CALLBACKS) for entry in plugins(group)]
    return [*import_module("miepo.objectives").__all__, *import_module("miepo.callbacks").__all__, *named]


def _alike(name: str, known: Sequence[str]) -> str:
    found = get_close_matches(name, known, 1)
    return f": did you mean {found[0]}?" if found else ""
