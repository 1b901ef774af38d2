"""Rows of a study: one for each run and evaluation, kept as text, whichever machine made them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from miepo.errors import UserError

Rows = dict[tuple[str, int], list[dict[str, Any]]]  # of finished runs: (method, seed) -> a row for each evaluation

ARITHMETIC = ("precision", "threads", "device")  # with these alike, a run repeats itself bit by bit
ORIGIN = (*ARITHMETIC, "versions", "commit", "parts")
LIBRARIES = ("torch", "transformers", "peft", "lightning")


def origin(precision: torch.dtype, device: torch.device, project: Path) -> dict[str, Any]:
    """With what arithmetic, libraries and commit this process computes; part of every row."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": where,
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "commit": commit(project),
    }


def commit(project: Path) -> str | None:
    """The commit of a folder, with a plus where files have changed since; None outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", project, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def append(file: Path, method: str, seed: int, made_of: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the rows of a run that has ended well; ``made_of`` are its ``fingerprint`` and ``parts``."""
    head = {"method": method, "seed": seed, **made_of, "of": len(rows)}
    text = "".join(json.dumps({**head, "evaluation": i, **row}) + "\n" for i, row in enumerate(rows))
    with file.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a row that was cut off must not swallow the next
                text = "\n" + text
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path, wanted: Mapping[tuple[str, int], str], parts: str | None = None) -> tuple[Rows, list[str]]:
    """The rows of finished runs, and sentences about what was left out.

    Args:
        file: It need not exist.
        wanted: The fingerprint that each run of the study has now; rows of other runs are passed over.
        parts: The hash of the parts that new runs share; None where there will be none.

    Raises:
        UserError: a run has rows of other settings than it would have now, or with other parts.
    """
    notes: list[str] = []
    groups: dict[tuple[tuple[str, int], str], dict[int, dict[str, Any]]] = {}
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            if line.strip():
                notes.append(f"Line {number} of {file.name} is no whole row and is left out.")
            continue
        key = (row["method"], row["seed"])
        if key not in wanted:
            continue
        if row["fingerprint"] != wanted[key]:
            raise UserError(
                f"{file} holds rows of other settings than {key[0]}, seed {key[1]} has now: expected another file "
                "for a changed study (--rows), or the old rows removed"
            )
        if parts is not None and row.get("parts", parts) != parts:
            raise UserError(
                f"{file} holds rows of {key[0]}, seed {key[1]} with another base model or other data than this machine "
                "has prepared: expected the folder 'parts' of those runs (--out), or another file (--rows)"
            )
        groups.setdefault((key, json.dumps([row.get(k) for k in ORIGIN])), {}).setdefault(row["evaluation"], row)
    found: Rows = {}
    for (key, _), rows in groups.items():
        each = [rows[i] for i in sorted(rows)]
        if len(each) == each[0]["of"] and key in found:
            both = "; ".join(_described(r[0]) for r in (found[key], each))
            notes.append(f"{key[0]}, seed {key[1]} was run more than once ({both}): the first counts.")
        elif len(each) == each[0]["of"]:
            found[key] = each
    for key, _ in groups:
        if key not in found:
            notes.append(f"Rows of {key[0]}, seed {key[1]} are missing in {file.name}: the run does not count.")
    return {key: found[key] for key in wanted if key in found}, [*dict.fromkeys(notes)]


def mixtures(found: Rows) -> list[str]:
    """Sentences about arithmetic, libraries or commits that differ between runs."""
    notes = []
    for key in ORIGIN:
        runs: dict[Any, dict[str, list[str]]] = {}
        for (method, seed), rows in found.items():
            runs.setdefault(rows[0].get(key), {}).setdefault(method, []).append(str(seed))
        if len(runs) > 1:
            told = (
                f"{value}: " + ", ".join(f"{method} {' '.join(seeds)}" for method, seeds in of.items())
                for value, of in runs.items()
            )
            notes.append(f"The runs differ in {key}: {'; '.join(told)}.")
    return notes


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    needed = {"method": str, "seed": int, "fingerprint": str, "evaluation": int, "of": int}
    whole = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in needed.items())
    return row if whole else None


def _described(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {row.get(key)}" for key in ORIGIN)
