"""``miepo init NAME``: a configuration for the user's own model, prompts and objectives."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from miepo.cli.configurations import packaged_folder
from miepo.errors import UserError


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    parser = ArgumentParser(
        prog="miepo init",
        description="Writes a commented configuration, which runs as it is and is there to be changed: "
        "miepo fit --config NAME.yaml.",
    )
    parser.add_argument("name", metavar="NAME", help="of the file, with or without .yaml, and of its runs")
    parser.add_argument("--base", help="your base model: a hub id, a folder or a .gguf file")
    parser.add_argument("--prompts", help="your prompts: a .jsonl file, a folder or a hub id; a tenth is held out")
    return parser


def main(args: Sequence[str]) -> None:
    """Write the configuration."""
    options = make_parser().parse_args(args)
    path = Path(options.name.removesuffix(".yaml") + ".yaml")
    if not re.fullmatch(r"\w[\w.-]*", path.stem):
        raise UserError(f"expected a name of letters, digits, _, - and dots, got '{path.stem}'")
    text = (packaged_folder() / "template.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^# (Run on|Result):.*\n(?:# {8,}.*\n)*", "", text, flags=re.M)  # of the template's own run
    text = text.replace("configs/template.yaml", str(path)).replace("name: template", f'name: "{path.stem}"')
    changes: dict[str, str | None] = {}
    if options.base is not None:
        changes["base"] = options.base
    if options.prompts is not None:
        changes |= {"prompts": options.prompts, "validation_prompts": None}
    for key, value in changes.items():
        yaml = json.dumps(value, ensure_ascii=False)  # which is YAML, too
        text = re.sub(rf"^( +{key}:) .*$", lambda line, yaml=yaml: f"{line[1]} {yaml}", text, flags=re.M)  # type: ignore[misc]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"expected a new file for the configuration, got '{path}', which exists") from None
    print(f"Configuration: {path}\nRun it: miepo fit --config {path}")
