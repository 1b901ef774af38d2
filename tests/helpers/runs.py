"""The folder of a run as training leaves it, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from miepo.metrics import ParetoFrontMetric
from miepo.preferences import evaluation_grid

NAMES = ("letter_e", "brevity")


def evaluation_rows(
    seed: int = 0, names: Sequence[str] = NAMES, prompts: int = 6, points: int | None = 3
) -> list[dict[str, Any]]:
    """What :class:`~miepo.callbacks.EvaluationRecord` writes, with rewards that follow the preference."""
    rng = np.random.default_rng([3, seed])
    grid = evaluation_grid(len(names), points).tolist()
    return [
        {
            "prompt": f"prompt {p}",
            "position": p,
            "grid_index": i,
            "preference": dict(zip(names, vector, strict=True)),
            "response": f"answer {p} under {i}",
            "rewards": dict(zip(names, (seed * np.array(vector) + rng.normal(size=len(names))).tolist(), strict=True)),
        }
        for p in range(prompts)
        for i, vector in enumerate(grid)
    ]


def figures(rows: Sequence[dict[str, Any]], reference_point: float = -1.0) -> dict[str, float]:
    """HV, MIP and CRD as :class:`~miepo.callbacks.ParetoFront` logs them."""
    grid = {row["grid_index"]: [*row["preference"].values()] for row in rows}
    metric = ParetoFrontMetric(torch.tensor([grid[i] for i in sorted(grid)]), reference_point)
    rewards = [[float("nan") if r is None else r for r in row["rewards"].values()] for row in rows]
    metric.update(
        *(torch.tensor(x) for x in (rewards, [row["grid_index"] for row in rows], [row["position"] for row in rows]))
    )
    return {f"front/{key}": float(value) for key, value in metric.compute().items() if key in ("hv", "mip", "crd")}


def state(rows: Sequence[dict[str, Any]], step: int, reference_point: float = -1.0, **others: float) -> dict[str, Any]:
    """The first line of an evaluation's file."""
    grid = {row["grid_index"]: [*row["preference"].values()] for row in rows}
    return {
        "step": step,
        "title": f"step {step}",
        "objectives": [*rows[0]["preference"]],
        "grid": [grid[i] for i in sorted(grid)],
        "figures": {key: x for key, x in figures(rows, reference_point).items() if isfinite(x)} | others,
        "arrays": {"front/reference_point": [reference_point] * len(rows[0]["preference"])},
    }


def write_run(
    folder: Path,
    evaluations: Sequence[Sequence[dict[str, Any]]] | None = None,
    config: dict[str, Any] | None = None,
    steps: int = 4,
    reference_point: float = -1.0,
) -> Path:
    """A run that was evaluated before and after ``steps`` steps."""
    evaluations = [evaluation_rows(0), evaluation_rows(1)] if evaluations is None else evaluations
    folder.mkdir(parents=True)
    (folder / "evaluations").mkdir()
    names = [*evaluations[0][0]["preference"]] if evaluations else NAMES
    log: list[dict[str, Any]] = []
    for i, rows in enumerate(evaluations):
        step = 0 if i == 0 else steps
        known = {"information/preference": 0.3 * i, "information/preference_low": 0.2 * i}
        known |= {"information/preference_high": 0.4 * i, "information/ceiling": 1.0986}
        head = state(rows, step, reference_point, **known)
        lines = [json.dumps(line) + "\n" for line in (head, *rows)]
        (folder / f"evaluations/step_{step:06d}.jsonl").write_text("".join(lines))
        if i:
            log += [
                {"loss": 1.4 - 0.1 * s, "kl": 0.1 * s, **{f"reward/{n}": 0.1 * s for n in names}, "step": s}
                for s in range(steps)
            ]
        log.append(head["figures"] | {"step": steps - 1 if i else 0})
    keys = [*dict.fromkeys(key for row in log for key in row)]
    lines = [",".join(keys), *(",".join(str(row.get(key, "")) for key in keys) for row in log)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0} | (config or {})))
    objectives = {name: {"mean": 1.0, "sd": 2.0, "of": {}} for name in names}
    (folder / "normalisation.json").write_text(json.dumps({"schema": 1, "objectives": objectives, "data": None}))
    return folder
