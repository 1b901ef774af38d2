"""Configuration files on the command line: where they are, and what no parser would say of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from miepo.errors import UserError
from miepo.resources import is_file

PACKAGE = Path(__file__).parents[1]
OPTIONS = ("-c", "--config")


def packaged_folder() -> Path:
    """Return the folder of the configurations that come with miepo."""
    inside = PACKAGE / "configs"  # of a wheel; in a checkout they are beside the package
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def packaged_configurations() -> dict[str, Path]:
    """Return the configurations that come with miepo, by name: ``quickstart``, ``methods/ric``."""
    folder = packaged_folder()
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if not name.startswith("studies/")}  # those are no runs


def find_configurations(args: Sequence[str]) -> list[str]:
    """Return a command line in which the name of a packaged configuration is replaced by its path.

    Raises:
        UserError: there is neither a file nor a packaged configuration of that name.
    """
    found = list(args)
    for place, option, value in _configurations(args):
        path = _find(value)
        found[place] = path if option is None else f"{option}={path}"
    return found


def _configurations(args: Sequence[str]) -> Iterator[tuple[int, str | None, str]]:
    """Yield place and value of each configuration, and its option where both are one word."""
    for place, word in enumerate(args):
        option, equals, value = word.partition("=")
        if place and args[place - 1] in OPTIONS:
            yield place, None, word
        elif equals and option in OPTIONS:
            yield place, option, value


def _find(value: str) -> str:
    # what is no plain name is YAML itself, which the parser takes in place of a file
    if os.path.exists(os.path.expanduser(value)) or not re.fullmatch(r"[\w./~ -]+", value):
        return value
    packaged = packaged_configurations()
    if (path := packaged.get(value.removesuffix(".yaml"))) is None:
        raise UserError(f"there is no configuration '{value}': expected a file or one of {', '.join(packaged)}")
    return str(path)


def check_yaml(args: Sequence[str]) -> None:
    """Refuse a configuration file that is no YAML, or in which a key stands twice.

    Of the first the parser says no line; of two keys it drops the first without a word.
    """
    for _, _, file in _configurations(args):
        if not is_file(Path(file)):  # a pipe can be read once, by the parser
            continue
        try:
            nodes = [yaml.compose(Path(file).read_text())]
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
            raise UserError(f"'{file}': expected YAML, got what is none{place}: {error.problem or error}") from None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says what it is
        looked_at: set[int] = set()
        while nodes:
            node = nodes.pop()
            if not isinstance(node, yaml.CollectionNode) or id(node) in looked_at:
                continue
            looked_at.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _refuse_repeated(node, file)
            nodes += [n for entry in node.value for n in (entry if isinstance(entry, tuple) else (entry,))]


def _refuse_repeated(node: yaml.MappingNode, file: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (first := lines.setdefault(key.value, line)) != line:
            raise UserError(f"'{file}' has the key '{key.value}' in lines {first} and {line}: expected it once")
