"""What a run left in its folder, read back: ``config.yaml``, ``metrics.csv`` and ``evaluations/``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from miepo.errors import UserError, first_line
from miepo.evaluation import (
    DEFAULT_REFERENCE_POINT,
    Answers,
    Evaluation,
    evaluation_files,
    read_evaluation,
)
from miepo.objectives.base import Normalisation
from miepo.objectives.normalisation import normalisations_in
from miepo.resources import is_file, is_folder

METRICS, CONFIG, NORMALISATION = "metrics.csv", "config.yaml", "normalisation.json"


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run holds."""

    folder: Path
    label: str
    config: Mapping[str, Any]
    config_text: str
    normalisation: Mapping[str, Normalisation]  # of the rewards, by objective; empty where it was not written
    series: Mapping[str, tuple[tuple[int, float], ...]]  # by metric: step and value, as logged
    evaluations: int  # how many were recorded
    first: Evaluation | None
    last: Evaluation | None  # None, too, where there is only one

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives: in column order where an evaluation was recorded, else as the log has them, by name."""
        if self.first:
            return self.first.names
        found = {m[2] for key in self.series if (m := re.fullmatch(r"(reward|front/sd)/(.+)", key))}
        return tuple(sorted(found))

    @property
    def latest(self) -> Evaluation | None:
        """The last evaluation that was recorded."""
        return self.last or self.first

    @property
    def answers(self) -> Answers | None:
        """Of the last evaluation, where they were kept."""
        return self.latest.answers if self.latest else None

    @property
    def reference_point(self) -> float:
        """Of the hypervolume."""
        return self.latest.reference_point if self.latest else DEFAULT_REFERENCE_POINT

    @property
    def steps(self) -> int:
        """How many steps the log knows of."""
        return max((points[-1][0] + 1 for key, points in self.series.items() if key == "loss"), default=0)


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read runs that are to be shown together.

    Raises:
        UserError: a folder is none of a run, a file in it is malformed, or the runs have different objectives.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UserError("a report is about runs: expected the folder of at least one, got none")
    for path in paths:
        check_folder(path)
    whole = [path.resolve() for path in paths]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise UserError(f"expected different runs, got '{paths[i]}' twice")
    runs = [read_run(path, label) for path, label in zip(paths, labels(whole), strict=True)]
    first = runs[0]
    for run in runs[1:]:
        if sorted(run.names) != sorted(first.names):
            raise UserError(
                f"runs in one report have the same objectives: expected those of '{first.folder}', "
                f"{list(first.names)}, got {list(run.names)} in '{run.folder}'"
            )
    names = next((run.names for run in runs if run.first), first.names)
    return [
        replace(run, first=run.first and run.first.ordered(names), last=run.last and run.last.ordered(names))
        for run in runs
    ]


def labels(folders: Sequence[Path]) -> list[str]:
    """Return short names that tell absolute folders apart: without the parts that all begin or end with.

    >>> labels([Path("/runs/a/version_0"), Path("/runs/b/version_0")])
    ['a', 'b']
    >>> labels([Path("/runs/quickstart/version_0")])
    ['quickstart/version_0']
    """
    if len(folders) == 1:
        return ["/".join(folders[0].parts[-2:])]
    parts = [list(folder.parts) for folder in folders]
    for end in (0, -1):
        while all(len(path) > 1 for path in parts) and len({path[end] for path in parts}) == 1:
            for path in parts:
                path.pop(end)
    return ["/".join(path) for path in parts]


def check_folder(folder: Path) -> None:
    """Refuse what is no run's folder."""
    if not is_folder(folder):
        raise UserError(
            f"expected the folder of a run, got '{folder}', which "
            + ("is a file" if is_file(folder) else "does not exist")
        )
    if not is_file(folder / METRICS):
        inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        hint = f"; there is one in '{inside[-1]}'" if inside else ""
        raise UserError(f"expected the folder of a run, with {METRICS} in it, got '{folder}', which has none{hint}")


def read_run(folder: Path, label: str | None = None) -> RunRecord:
    """Read the folder of a run, finished or not.

    Raises:
        UserError: it is none, or a file in it is malformed.
    """
    check_folder(folder)
    text = read_text(folder / CONFIG) if is_file(folder / CONFIG) else ""
    rows = read_metrics(folder / METRICS)
    files = evaluation_files(folder)
    return RunRecord(
        folder=folder,
        label=label or labels([folder.resolve()])[0],
        config=read_config(folder / CONFIG, text),
        config_text=text,
        normalisation=normalisations_in(folder / NORMALISATION)[0] if is_file(folder / NORMALISATION) else {},
        series=series_of(rows),
        evaluations=len(files),
        first=read_evaluation(files[0]) if files else None,
        last=read_evaluation(files[-1]) if len(files) > 1 else None,
    )


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Return why figures of these runs do not stand on one scale; none where they do."""
    reasons = []
    for name in runs[0].names:
        known = [(run.label, run.normalisation[name]) for run in runs if name in run.normalisation]
        if len({(f"{n.mean:.6g}", f"{n.sd:.6g}") for _, n in known}) > 1:
            listed = "; ".join(f"{label} by mean {n.mean:.4g}, sd {n.sd:.4g}" for label, n in known)
            reasons.append(f"Rewards of {name} are normalised in different ways: {listed}.")
    if len({tuple(sorted(set(run.answers.prompts))) for run in runs if run.answers}) > 1:
        reasons.append("The runs were evaluated on different prompts.")
    if len({tuple(map(tuple, run.latest.grid.tolist())) for run in runs if run.latest}) > 1:
        reasons.append("The runs were evaluated under different preference vectors.")
    if len({run.reference_point for run in runs}) > 1:
        points = ", ".join(f"{run.label} {run.reference_point:g}" for run in runs)
        reasons.append(f"The hypervolume's reference points differ: {points}.")
    return reasons


# -- the configuration -------------------------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    """Read a text file of a run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"expected text in '{file}', got {first_line(error)}") from None


def read_config(file: Path, text: str) -> Mapping[str, Any]:
    """Parse the configuration of a run, ``text`` of ``file``.

    Raises:
        UserError: it is none.
    """
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"expected YAML in '{file}', got {first_line(error)}") from None
    if config is not None and not isinstance(config, dict):
        raise UserError(f"expected settings by name in '{file}', got {type(config).__name__}")
    return config or {}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted path; the entries of a list of objects by their class, or by number.

    >>> flat({"a": {"b": 1}, "c": [{"class_path": "x.Y", "init_args": {"d": 2}}, 3], "e": [4, 5]})
    {'a.b': 1, 'c.Y.class_path': 'x.Y', 'c.Y.init_args.d': 2, 'c.1': 3, 'e': [4, 5]}
    """
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        kinds = [
            str(entry["class_path"]).rpartition(".")[2] if isinstance(entry, Mapping) and "class_path" in entry else i
            for i, entry in enumerate(value)
        ]
        pairs = zip([k if kinds.count(k) == 1 else i for i, k in enumerate(kinds)], value, strict=True)
    else:
        pairs = ()
    found: dict[str, Any] = {}
    for key, inside in pairs:
        found |= flat(inside, f"{prefix}.{key}" if prefix else str(key))
    return found or {prefix: value}


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the settings in which configurations differ, with the value of each; ``–`` where one has no such setting.

    Raises:
        UserError: a configuration contains itself.
    """
    try:
        every = [flat(config) for config in configs]
    except RecursionError:
        raise UserError(f"expected a {CONFIG} with an end, got one in which something contains itself") from None
    keys = list(dict.fromkeys(key for settings in every for key in settings if key))
    rows = [
        (key, [json.dumps(s[key], ensure_ascii=False, default=str) if key in s else "–" for s in every]) for key in keys
    ]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# -- the log -----------------------------------------------------------------------------------------------------------


def read_metrics(file: Path) -> list[tuple[int, dict[str, float]]]:
    """Return rows of the log: a step and the finite numbers of that row."""
    try:
        header, *lines = [*csv.reader(StringIO(read_text(file)))] or [[]]
    except csv.Error as error:
        raise UserError(f"expected comma-separated values in '{file}', got {first_line(error)}") from None
    if "step" not in header:
        raise UserError(f"expected a column 'step' in '{file}', got {header[:8]}")
    rows = []
    for number, cells in enumerate(lines, 2):
        try:
            row = {key: float(cell) for key, cell in zip(header, cells, strict=True) if cell}
            step = int(row.pop("step"))
        except (ValueError, KeyError, OverflowError):
            if number == len(lines) + 1:  # cut short: the run is writing it, or was killed meanwhile
                break
            raise UserError(
                f"{file}, line {number}: expected a number or nothing in each of {len(header)} columns and a step, "
                f"got {[cell for cell in cells if cell][:8]} in {len(cells)}"
            ) from None
        rows.append((step, {key: value for key, value in row.items() if isfinite(value)}))
    return rows


def series_of(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the steps and values of every metric, from the rows of a log."""
    keys = sorted({key for _, row in rows for key in row} - {"epoch"})
    return {key: tuple((step, row[key]) for step, row in rows if key in row) for key in keys}
