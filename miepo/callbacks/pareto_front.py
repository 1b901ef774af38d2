"""The Pareto front during training: HV, MIP, CRD, per-axis sd, a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.evaluation import DEFAULT_REFERENCE_POINT, MEANS, REFERENCE_POINT
from miepo.metrics import ParetoFrontMetric
from miepo.metrics.front_plot import draw_front
from miepo.preferences import format_preference
from miepo.training.reporting import log_image, log_table, run_folder
from miepo.types import EvaluationBatch

METRIC, FINISHED = "pareto_front", "finished"


class ParetoFront(EvaluationCallback):
    """Measures the front at every evaluation and draws it.

    Logs ``front/hv``, ``front/mip``, ``front/crd`` and, for every objective, ``front/sd/NAME`` and the
    ``front/best/NAME`` that a preference vector reached, which is the largest of several noisy means and so flattered;
    ``front/left_out`` responses had no score, and the share ``front/finished`` ended before the token limit. The
    hypervolume is flattered, too: ``front/hv_above_chance`` is what it has above that of permuted preferences,
    ``front/hv_p`` how often these reach it, ``front/hv_corrected`` (``.._low``, ``.._high``) the value without the bias
    that a bootstrap over prompts shows. MIP is ``front/mip_level``, where the rewards lie, plus
    ``front/mip_covariance``, how far they follow the preferences. The picture goes to ``fronts/`` in the run's folder
    and to the logger.

    Args:
        reference_point: Coordinate of the hypervolume's reference point on every axis, in normalised rewards. With the
            default of -1, one sd below the mean that the rewards are normalised by, a policy that has learnt nothing
            has a hypervolume of 1.
        draw: Draw the front at every evaluation.
    """

    def __init__(self, reference_point: float = DEFAULT_REFERENCE_POINT, draw: bool = True) -> None:
        self.reference_point, self.draw = reference_point, draw
        self.picture: Path | None = None

    def start(self, trainer: Trainer, module: Any, grid: Tensor) -> None:
        module.metrics[METRIC] = ParetoFrontMetric(grid, self.reference_point)
        module.metrics[FINISHED] = MeanMetric()

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        module.metrics[METRIC].update(batch.scores, batch.grid_index, torch.tensor(batch.positions))
        module.metrics[FINISHED].update(batch.responses.finished.float())

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        metric, names = module.metrics[METRIC], module.names
        result = metric.compute()
        # torchmetrics makes a number of what has one element
        means, sd = result["means"].view(len(metric.grid), -1).cpu(), result["sd"].view(-1)  # (M, K), (K,)
        values = {f"front/{key}": result[key].float() for key in result if key not in ("sd", "means")}
        for k, name in enumerate(names):
            values[f"front/sd/{name}"] = sd[k].float()
            values[f"front/best/{name}"] = means[:, k].nan_to_num(-float("inf")).max().float()
        if result["left_out"]:
            rank_zero_warn(
                f"{int(result['left_out'])} responses are not in the front: an objective gave them no finite score"
            )
        values["front/finished"] = module.metrics[FINISHED].compute()
        metric.reset()
        module.metrics[FINISHED].reset()
        if trainer.is_global_zero:
            rows = [(format_preference(w, names), *s) for w, s in zip(metric.grid.cpu(), means.tolist(), strict=True)]
            log_table(trainer, "front/table", ["preference", *names], rows)
        if trainer.is_global_zero and self.draw:
            self.picture = run_folder(trainer) / "fronts" / f"step_{trainer.global_step:06d}.png"
            before = module.evaluations[0].means if module.evaluations else None
            before = None if before is None else before.tolist()
            figure = draw_front(metric.grid.cpu(), means, names, before, f"{trainer.global_step} steps")
            self.picture.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.picture, dpi=150)
            log_image(trainer, "front/picture", self.picture)
        return values | {MEANS: means, REFERENCE_POINT: torch.full((len(names),), self.reference_point)}
