"""Whether the policy obeys its preference vector, measured at every evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.metrics import SteerabilityMetric, interval_figures
from miepo.training.reporting import log_table
from miepo.types import EvaluationBatch

METRIC = "steerability"


class Steerability(EvaluationCallback):
    """Measures how far each objective follows its weight.

    At every evaluation it logs, for each objective, ``steerability/NAME``: the slope of its mean normalised reward
    along its own weight, in standard deviations from weight 0 to weight 1, with a 95 % t interval over prompts
    (``.._low``, ``.._high``); ``steerability_rank/NAME``, the rank correlation of the two over the grid; and
    ``side_effect/NAME/OTHER``, the slope of NAME along the weight of OTHER, with its interval in the table of the
    loggers that take tables. How much of a slope is too much (overshoot) is not measured: nothing says which reward
    belongs to which weight.
    """

    def start(self, trainer: Trainer, module: Any, grid: Tensor) -> None:
        module.metrics[METRIC] = SteerabilityMetric(grid)
        if grid.shape[1] > 1 and len(grid.unique(dim=0)) < 2:
            rank_zero_warn("the evaluation grid has one preference vector: nothing tells whether the policy obeys")

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        module.metrics[METRIC].update(batch.scores, batch.grid_index, torch.tensor(batch.positions))

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        metric, names = module.metrics[METRIC], module.names
        k = len(names)
        # torchmetrics makes a number of what has one element
        result = {key: x.cpu().view(k) if key == "rank" else x.cpu().view(k, k) for key, x in metric.compute().items()}
        metric.reset()
        values: dict[str, Tensor] = {}
        for j, name in enumerate(names):
            values |= interval_figures(f"steerability/{name}", [result[p][j, j] for p in ("slope", "low", "high")])
            values[f"steerability_rank/{name}"] = result["rank"][j]
            for k, other in enumerate(names):
                if k != j:
                    values[f"side_effect/{name}/{other}"] = result["slope"][j, k]
        if trainer.is_global_zero:
            rows = [
                (name, other, *(float(result[part][j, k]) for part in ("slope", "low", "high")))
                for j, name in enumerate(names)
                for k, other in enumerate(names)
            ]
            log_table(trainer, "steerability/table", ["reward", "weight", "slope", "low", "high"], rows)
        # NaN where it is not known: a value left out would stand as it was at the evaluation before
        return {key: v.float() for key, v in values.items()}
