"""The finished runs of a study, kept as text: a line for each, with a row for every evaluation."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from miepo.errors import UserError

Rows = dict[tuple[str, int], list[dict[str, Any]]]  # of finished runs: (method, seed) -> a row for each evaluation

ORIGIN = ("precision", "threads", "device", "versions", "commit", "parts")
LIBRARIES = ("torch", "transformers", "peft", "lightning")
NUMBER = (int, float)
RUN = {"method": str, "seed": int, "fingerprint": str, "names": list, "evaluations": list}
EVALUATION = {
    "step": NUMBER, "scored_responses": NUMBER, "reference_point": NUMBER, "grid": list, "front": list,
}  # fmt: skip


def origin(precision: torch.dtype, device: torch.device, project: Path) -> dict[str, Any]:
    """Say with what arithmetic, libraries and commit this process computes."""
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
    """Name the commit of a folder, with a plus where files other than rows have changed.

    None outside of git.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", project, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*.jsonl")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_writable(file: Path) -> None:
    """Refuse a file that runs could not be added to, before any has begun.

    Raises:
        UserError: says why.
    """
    try:
        file.open("ab").close()
    except OSError as error:
        raise UserError(f"expected a file for the rows of finished runs, got '{file}': {error.strerror}") from None


def append(file: Path, run: Mapping[str, Any]) -> None:
    """Add a run that has ended well: what :data:`RUN` names, and its origin.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(run) + "\n"
    try:
        with file.open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a line that was cut off must not swallow the next
                    text = "\n" + text
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"expected a file for the rows of finished runs, got '{file}': {error.strerror}") from None


def read(file: Path, wanted: Mapping[tuple[str, int], str]) -> tuple[Rows, list[str]]:
    """Read the rows of finished runs, and say in sentences what was left out.

    Args:
        file: It need not exist.
        wanted: The fingerprint that each run of the study has now; other runs are passed over.

    Raises:
        UserError: a run had other settings than it would have now, or the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file.exists() else []
    except OSError as error:
        raise UserError(f"expected a file of rows, got '{file}': {error.strerror}") from None
    notes: list[str] = []
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        run = _run(line)
        if run is None:
            if line.strip():
                notes.append(f"Line {number} of {file.name} is no whole run and is left out.")
            continue
        key = (run["method"], run["seed"])
        if key not in wanted:
            continue
        if run["fingerprint"] != wanted[key]:
            raise UserError(
                f"{file} holds rows of other settings than {key[0]}, seed {key[1]} has now: expected another file "
                "for a changed study (--rows), or the old rows removed"
            )
        first = runs.setdefault(key, run)
        if first is not run and _figures(first) != _figures(run):
            both = "; ".join(", ".join(f"{k} {r.get(k)}" for k in ORIGIN) for r in (first, run))
            notes.append(f"{key[0]}, seed {key[1]} was run more than once ({both}): the first counts.")
    return {key: _rows(runs[key]) for key in wanted if key in runs}, notes


def mixtures(found: Rows) -> list[str]:
    """Say where the runs differ in arithmetic, libraries, commit or prepared parts."""
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


def _run(line: str) -> dict[str, Any] | None:
    try:
        run = json.loads(line)
    except ValueError:
        return None
    whole = (
        _has(run, RUN)
        and all(isinstance(run.get(key), (str, int, type(None))) for key in ORIGIN)
        and run["evaluations"] != []
        and all(_has(row, EVALUATION) for row in run["evaluations"])
    )
    return run if whole else None


def _has(values: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(values, dict) and all(
        isinstance(values.get(key), kind) and not isinstance(values[key], bool) for key, kind in kinds.items()
    )


def _rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    head = {key: value for key, value in run.items() if key != "evaluations"}
    return [{**head, **row} for row in run["evaluations"]]


def _figures(run: Mapping[str, Any]) -> str:
    """Return what two runs alike bit by bit share."""
    return json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in run["evaluations"]], sort_keys=True)
