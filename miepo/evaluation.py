"""One evaluation of a policy: what was measured and what was answered, from training to report, export and study."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

from miepo.errors import UserError, first_line, invalid, short
from miepo.metrics.front_plot import Front

FOLDER = "evaluations"  # in the folder of a run
MEANS, REFERENCE_POINT = "front/means", "front/reference_point"
DEFAULT_REFERENCE_POINT = -1.0  # ParetoFront's


@dataclass(frozen=True)
class Answers:
    """The answers of an evaluation that were kept: N of them.

    Attributes:
        names: Of the ``K`` objectives, in column order.
        grid: ``(M, K)`` the preference vectors that have an answer.
        grid_index: ``(N,)`` under which of them each was given.
        positions: ``(N,)`` of the prompts in the evaluation set.
        scores: ``(N, K)`` normalised rewards, NaN where there is none.
        prompts: ``N`` texts.
        responses: ``N`` texts.
    """

    names: tuple[str, ...]
    grid: Tensor
    grid_index: Tensor
    positions: Tensor
    scores: Tensor
    prompts: tuple[str, ...]
    responses: tuple[str, ...]

    def ordered(self, names: tuple[str, ...]) -> Answers:
        """Return the same with its columns in the order of ``names``."""
        columns = [self.names.index(name) for name in names]
        return replace(self, names=names, grid=self.grid[:, columns], scores=self.scores[:, columns])


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured.

    Attributes:
        step: Optimiser steps taken before it; None outside of training, where no one counts them.
        title: ``step 16``, or the command: ``validate``, ``test``.
        names: Of the ``K`` objectives, in column order.
        grid: ``(M, K)`` preference vectors.
        figures: Numbers by the name they are logged under, the finite ones.
        arrays: What has dimensions and is not logged: ``front/means`` ``(M, K)``, ``front/reference_point`` ``(K,)``.
        answers: Those that were kept, where it was read from a file.
    """

    step: int | None
    title: str
    names: tuple[str, ...]
    grid: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Answers | None = None

    @property
    def means(self) -> Tensor | None:
        """Mean normalised rewards ``(M, K)`` under each vector, where :class:`~miepo.callbacks.ParetoFront` ran."""
        return self.arrays.get(MEANS)

    @property
    def reference_point(self) -> float:
        """Coordinate of the hypervolume's reference point on every axis."""
        point = self.arrays.get(REFERENCE_POINT)
        return DEFAULT_REFERENCE_POINT if point is None else float(point[0])

    def ordered(self, names: tuple[str, ...]) -> Evaluation:
        """Return the same with its columns in the order of ``names``."""
        columns = [self.names.index(name) for name in names]
        arrays = {k: v[:, columns] if k == MEANS else v for k, v in self.arrays.items()}
        answers = self.answers and self.answers.ordered(names)
        return replace(self, names=names, grid=self.grid[:, columns], arrays=arrays, answers=answers)

    def state(self) -> dict[str, Any]:
        """Return all but the answers as JSON and a checkpoint keep it."""
        return {
            "step": self.step,
            "title": self.title,
            "objectives": list(self.names),
            "grid": self.grid.tolist(),
            "figures": dict(self.figures),
            "arrays": {key: _without_nan(value.tolist()) for key, value in self.arrays.items()},
        }

    @classmethod
    def of_state(cls, state: Any) -> Evaluation:
        """Return what :meth:`state` was made of.

        Raises:
            ValueError: it is malformed.
        """
        head = _Head.model_validate(state)
        k = len(head.objectives)
        if any(len(weights) != k for weights in head.grid):
            raise ValueError(f"expected {k} weights in each vector of the grid, got {short(head.grid)}")
        try:
            arrays = {key: torch.tensor(_with_nan(value), dtype=torch.float64) for key, value in head.arrays.items()}
        except TypeError as error:
            raise ValueError(f"expected numbers in arrays, got another: {error}") from None
        for key, shape in ((MEANS, (len(head.grid), k)), (REFERENCE_POINT, (k,))):
            if key in arrays and arrays[key].shape != shape:
                raise ValueError(f"expected {key} of shape {shape}, got {tuple(arrays[key].shape)}")
        grid = torch.tensor(head.grid, dtype=torch.float64).view(len(head.grid), k)
        return cls(head.step, head.title, tuple(head.objectives), grid, head.figures, arrays)


def measured_front(evaluations: Sequence[Evaluation]) -> Front | None:
    """Return the front of the last of a run's evaluations beside that of the first; None where none was measured."""
    means = evaluations[-1].means if evaluations else None
    if means is None:
        return None
    first, last = evaluations[0], evaluations[-1]
    return Front(last.names, last.grid, means, None if first is last else first.means)


# -- files -------------------------------------------------------------------------------------------------------------


def write_evaluation(folder: Path, evaluation: Evaluation, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``step_000016.jsonl`` or ``validate.jsonl``: a line with what was measured, then a line for each answer."""
    name = evaluation.title if evaluation.step is None else f"step_{evaluation.step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in (evaluation.state(), *rows))
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(folder / f"{name}.jsonl")  # a file of this name is whole


def evaluation_files(run: Path) -> list[Path]:
    """Return the evaluations of training in their order; where there is none, one of a checkpoint."""
    files = [p for p in (run / FOLDER).glob("step_*.jsonl") if p.stem.removeprefix("step_").isdecimal()]
    if files:
        return sorted(files, key=lambda path: int(path.stem.removeprefix("step_")))
    return [path for name in ("validate", "test") if (path := run / FOLDER / f"{name}.jsonl").is_file()][:1]


def read_evaluation(file: Path) -> Evaluation:
    """Read what :func:`write_evaluation` wrote; of an earlier version the answers, which were all that was kept.

    Raises:
        UserError: a line is malformed; the message names it.
    """
    try:
        content = file.read_bytes().split(b"\n")  # JSON leaves other line ends inside a text
    except OSError as error:
        raise UserError(f"expected an evaluation in '{file}', got {first_line(error)}") from None
    lines = [(f"{file}, line {number}", line) for number, line in enumerate(content, 1) if line.strip()]
    if not lines:
        raise UserError(f"expected an evaluation in '{file}', got an empty file")
    stem = file.stem.removeprefix("step_")
    step = int(stem) if stem.isdecimal() else None
    title = file.stem if step is None else f"step {step}"
    first = _parsed(*lines[0])
    if "figures" in first:
        try:
            evaluation = Evaluation.of_state(first | {"step": step, "title": title})
        except ValueError as error:
            raise UserError(f"{lines[0][0]}: {invalid(error)}") from None
        return replace(evaluation, answers=_answers(evaluation.names, lines[1:]) if lines[1:] else None)
    answers = _answers(None, lines)
    return Evaluation(step, title, answers.names, answers.grid, answers=answers)


class _Head(BaseModel):
    model_config = ConfigDict(strict=True)
    step: int | None = Field(lt=2**62)
    title: str
    objectives: list[str]
    grid: list[list[FiniteFloat]]
    figures: dict[str, FiniteFloat]
    arrays: dict[str, list[Any]]


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt: str
    response: str
    position: int = Field(ge=-(2**62), lt=2**62)
    grid_index: int = Field(ge=-(2**62), lt=2**62)
    preference: dict[str, FiniteFloat] = Field(min_length=1)
    rewards: dict[str, float | None]


def _parsed(where: str, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def _answers(names: tuple[str, ...] | None, lines: Sequence[tuple[str, bytes]]) -> Answers:
    rows = []
    for where, line in lines:
        try:
            row = _Row.model_validate(_parsed(where, line))
        except ValidationError as error:
            raise UserError(f"{where}: {invalid(error)}") from None
        names = names or tuple(row.preference)
        if not tuple(row.preference) == tuple(row.rewards) == names:
            raise UserError(
                f"{where}: expected a weight and a reward for each objective of {list(names)}, got weights of "
                f"{[*row.preference]} and rewards of {[*row.rewards]}"
            )
        rows.append(row)
    assert names is not None
    vectors = {row.grid_index: [*row.preference.values()] for row in reversed(rows)}
    indices = {index: i for i, index in enumerate(sorted(vectors))}  # where an evaluation was cut, some have no answer
    return Answers(
        names=names,
        grid=torch.tensor([vectors[index] for index in indices], dtype=torch.float64),
        grid_index=torch.tensor([indices[row.grid_index] for row in rows]),
        positions=torch.tensor([row.position for row in rows]),
        scores=torch.tensor(_with_nan([[row.rewards[name] for name in names] for row in rows]), dtype=torch.float64),
        prompts=tuple(row.prompt for row in rows),
        responses=tuple(row.response for row in rows),
    )


def _with_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_with_nan(value) for value in values]
    return float("nan") if values is None else values


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if values != values else values  # JSON knows no NaN


# -- checkpoints and exports -------------------------------------------------------------------------------------------


def evaluations_in(saved: Mapping[str, Any], names: Sequence[str], older: Mapping[str, Any]) -> list[Evaluation]:
    """Return the first and the last evaluation of a run, as a checkpoint or an exported folder keeps them.

    Args:
        saved: The entry of a checkpoint, or the card of a folder.
        names: Of the objectives.
        older: States of callbacks, in which earlier versions kept the same.

    Raises:
        ValueError: it is malformed.
    """
    if isinstance(saved.get("evaluations"), list):
        return [Evaluation.of_state(state) for state in saved["evaluations"]]
    front, table = older.get("ParetoFront") or {}, older.get("EvaluationTable") or {}
    point = {} if front.get("reference_point") is None else {REFERENCE_POINT: [front["reference_point"]] * len(names)}
    found = []
    for column, means in ((table.get("first"), front.get("before")), (table.get("last"), front.get("after"))):
        if column or means:
            step, metrics = (column or {}).get("step"), (column or {}).get("metrics", {})
            state = {"step": step, "title": "measured" if step is None else f"step {step}", "objectives": list(names)}
            state["figures"] = {key: float(value) for key, value in metrics.items() if isfinite(value)}
            state |= {"grid": front.get("grid") or [], "arrays": {MEANS: means} | point if means else {}}
            found.append(Evaluation.of_state(state))
    return found[-1:] if table and table.get("first") == table.get("last") else found
