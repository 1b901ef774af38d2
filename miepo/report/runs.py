"""What a run left in its folder, read back: ``config.yaml``, ``metrics.csv`` and ``evaluations/``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from miepo.callbacks.evaluation_record import FOLDER
from miepo.errors import UserError, first_line
from miepo.objectives.base import Normalisation
from miepo.objectives.normalisation import normalisations_in
from miepo.resources import is_file, is_folder

METRICS, CONFIG, NORMALISATION = "metrics.csv", "config.yaml", "normalisation.json"
REFERENCE_POINT = -1.0  # ParetoFront's default


@dataclass(frozen=True)
class Evaluation:
    """The answers of one evaluation: N of them, to prompts under the M vectors of a grid."""

    title: str  # "step 16"; "validate" for one outside of training
    step: int | None
    names: tuple[str, ...]  # of the objectives, in column order
    grid: Tensor  # (M, K)
    grid_index: Tensor  # (N,)
    positions: Tensor  # (N,) of the prompts in the evaluation set
    scores: Tensor  # (N, K) normalised rewards, NaN where there is none
    prompts: tuple[str, ...]
    responses: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run holds."""

    folder: Path
    label: str
    config: Mapping[str, Any]
    config_text: str
    normalisation: Mapping[str, Normalisation]  # of the rewards, by objective; empty where it was not written
    series: Mapping[str, tuple[tuple[int, float], ...]]  # by metric: step and value, as logged
    figures: tuple[tuple[int, Mapping[str, float]], ...]  # of every evaluation: steps taken and what was logged
    evaluations: int  # how many have their answers kept
    first: Evaluation | None
    last: Evaluation | None  # None, too, where there is only one

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives: in column order where answers were kept, else as the log has them, by name."""
        if self.first:
            return self.first.names
        found = {m[2] for key in self.series if (m := re.fullmatch(r"(reward|front/sd)/(.+)", key))}
        return tuple(sorted(found))

    @property
    def latest(self) -> Evaluation | None:
        return self.last or self.first

    @property
    def reference_point(self) -> float:
        """Of the hypervolume."""
        trainer = self.config.get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
        for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
            if isinstance(entry, Mapping) and str(entry.get("class_path")).endswith("ParetoFront"):
                value = _number((entry.get("init_args") or {}).get("reference_point"))
                return REFERENCE_POINT if value is None else value
        return REFERENCE_POINT

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
        replace(run, first=run.first and ordered(run.first, names), last=run.last and ordered(run.last, names))
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


def ordered(evaluation: Evaluation, names: tuple[str, ...]) -> Evaluation:
    """Return the same with its columns in the order of ``names``."""
    columns = [evaluation.names.index(name) for name in names]
    return replace(evaluation, names=names, grid=evaluation.grid[:, columns], scores=evaluation.scores[:, columns])


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
        figures=figures_of(rows),
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
            each = "; ".join(f"{label} by mean {n.mean:.4g}, sd {n.sd:.4g}" for label, n in known)
            reasons.append(f"Rewards of {name} are normalised in different ways: {each}.")
    evaluations = [run.latest for run in runs if run.latest]
    if len({tuple(sorted(set(e.prompts))) for e in evaluations}) > 1:
        reasons.append("The runs were evaluated on different prompts.")
    if len({tuple(map(tuple, e.grid.tolist())) for e in evaluations}) > 1:
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


def of_evaluation(key: str) -> bool:
    """Return whether a metric is logged at evaluations, and not at steps."""
    return key.startswith(
        (
            "front/",
            "steerability",
            "side_effect/",
            "information/preference",
            "information/ceiling",
            "information/feedback",
        )
    )


def figures_of(rows: Sequence[tuple[int, Mapping[str, float]]]) -> tuple[tuple[int, dict[str, float]], ...]:
    """Return what was logged at every evaluation, with the steps that had been taken.

    Callbacks log the evaluation before training each in a row of its own, and Lightning names later ones, in rows with
    an epoch, by the last step: an evaluation after 16 steps is logged at step 15.
    """
    found: list[tuple[int, dict[str, float]]] = []
    trained = False
    for step, row in rows:
        own = {key: value for key, value in row.items() if of_evaluation(key)}
        trained = trained or "loss" in row or "epoch" in row
        taken = step + 1 if trained else step
        if own and found and found[-1][0] == taken and not own.keys() & found[-1][1].keys():
            found[-1][1].update(own)
        elif own:
            found.append((taken, own))
    return tuple(found)


# -- the answers -------------------------------------------------------------------------------------------------------


def evaluation_files(folder: Path) -> list[Path]:
    """Return the evaluations of training in their order; where there is none, one of a checkpoint."""
    files = [p for p in (folder / FOLDER).glob("step_*.jsonl") if p.stem.removeprefix("step_").isdecimal()]
    if files:
        return sorted(files, key=lambda path: int(path.stem.removeprefix("step_")))
    return [path for name in ("validate", "test") if (path := folder / FOLDER / f"{name}.jsonl").is_file()][:1]


def read_evaluation(file: Path) -> Evaluation:
    """Read what :class:`~miepo.callbacks.EvaluationRecord` wrote.

    Raises:
        UserError: a line is malformed; the message names it.
    """
    rows: list[dict[str, Any]] = []
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"expected answers in '{file}', got {first_line(error)}") from None
    for number, line in enumerate(content.split(b"\n"), 1):  # JSON leaves other line ends inside a text
        if line.strip():
            where = f"{file}, line {number}"
            rows.append(_checked(line, where))
            if [*rows[-1]["preference"]] != [*rows[0]["preference"]]:
                raise UserError(
                    f"{where}: expected objectives {[*rows[0]['preference']]}, got {[*rows[-1]['preference']]}"
                )
    if not rows:
        raise UserError(f"expected answers in '{file}', got an empty file")
    names = tuple(rows[0]["preference"])
    vectors = {row["grid_index"]: [*row["preference"].values()] for row in reversed(rows)}
    indices = {index: i for i, index in enumerate(sorted(vectors))}  # where an evaluation was cut, some have no answer
    step = file.stem.removeprefix("step_")
    return Evaluation(
        title=f"step {int(step)}" if step.isdecimal() else file.stem,
        step=int(step) if step.isdecimal() else None,
        names=names,
        grid=torch.tensor([vectors[index] for index in indices], dtype=torch.float64),
        grid_index=torch.tensor([indices[row["grid_index"]] for row in rows]),
        positions=torch.tensor([row["position"] for row in rows]),
        scores=torch.tensor([[row["rewards"][name] for name in names] for row in rows], dtype=torch.float64),
        prompts=tuple(row["prompt"] for row in rows),
        responses=tuple(row["response"] for row in rows),
    )


def _checked(line: bytes, where: str) -> dict[str, Any]:
    """Return one line as a row of which every value has its type; NaN for a reward that is null."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got {first_line(error)}") from None
    kinds = {"prompt": str, "response": str, "position": int, "grid_index": int, "preference": dict, "rewards": dict}
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key, kind in kinds.items():
        if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            raise UserError(f"{where}: expected {key} of type {kind.__name__}, got {str(row.get(key))[:80]!r}")
        if kind is int and abs(row[key]) >= 2**62:
            raise UserError(
                f"{where}: expected {key} to be a place in the evaluation, got a number of {len(str(row[key]))} digits"
            )
    if not row["preference"] or row["preference"].keys() != row["rewards"].keys():
        raise UserError(
            f"{where}: expected a weight and a reward for each objective, got weights of {[*row['preference']]} and "
            f"rewards of {[*row['rewards']]}"
        )
    rewards = {name: nan if reward is None else _number(reward) for name, reward in row["rewards"].items()}
    preference = {name: _number(weight) for name, weight in row["preference"].items()}
    if None in rewards.values() or not all(w is not None and isfinite(w) for w in preference.values()):
        got = f"{row['preference']}, {row['rewards']}"
        raise UserError(f"{where}: expected numbers in preference and rewards, got {got[:160]}")
    return row | {"rewards": rewards, "preference": preference}


def _number(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
