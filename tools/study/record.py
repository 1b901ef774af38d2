"""What a study keeps of a run: one row per evaluation, written as it happens."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.callbacks.pareto_front import METRIC as FRONT
from miepo.callbacks.preference_information import grid_log_prob, read_by_prompt
from miepo.metrics import reward_overlap
from miepo.metrics.steerability import preference_slopes, t_interval
from miepo.policy import Policy
from miepo.types import EvaluationBatch
from tools.study import rows

EVALUATIONS, RESULT = "evaluations.jsonl", "result.json"
ROOT = Path(__file__).resolve().parents[2]


def divergence(policy: Policy, batch: EvaluationBatch, grid: Tensor) -> Tensor:
    """Estimate the KL divergence of the policy under each response's preference to the base on the plain prompt.

    Returns:
        ``(N,)`` the log-ratio of each response, in nats.
    """
    index = batch.grid_index.unsqueeze(1)  # (N, 1)
    with policy.evaluating():
        wanted = torch.zeros(len(batch), len(grid), dtype=torch.bool).scatter_(1, index.cpu(), True)
        own = grid_log_prob(policy, batch, grid, wanted).gather(1, index)
        with policy.silent():
            base = read_by_prompt(
                batch,
                torch.ones(len(batch), 1, dtype=torch.bool),
                lambda prompts, tokens, each: policy.reference_response_log_prob(
                    prompts, grid[:1].expand(len(prompts), -1, -1), tokens, each
                ),
            )
    return (own - base).squeeze(1)


class Record(EvaluationCallback):
    """Writes ``evaluations.jsonl`` while a run trains, and ``result.json`` once it has ended well.

    The second has with what arithmetic, libraries and commit the run was made.

    Beside what other callbacks log, a row has the KL divergence of the policy under each preference to the base policy
    on the plain prompt (the same reference for every method, whatever its prompts say), the length of the responses,
    slopes and side effects, the overlap of the rewards of neighbouring preferences, the front, and the work done so
    far.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.begin = self.evaluating = self.evaluated = 0.0
        self.rows: list[dict[str, Any]] = []
        self._clear()

    def _clear(self) -> None:
        self.scores: list[Tensor] = []
        self.index: list[Tensor] = []
        self.positions: list[int] = []
        self.finished: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.lengths: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.origin = rows.origin(pl_module.policy.weight_dtype, pl_module.policy.device, ROOT)
        (self.folder / EVALUATIONS).unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.begin, self.evaluated = perf_counter(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.evaluating = perf_counter()

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        self.kl.append(divergence(module.policy, batch, trainer.datamodule.grid).cpu())  # type: ignore[attr-defined]
        self.lengths.append(batch.responses.tokens.flat().mask.sum(-1).float().cpu())
        assert batch.scores is not None
        self.scores.append(batch.scores.cpu())
        self.index.append(batch.grid_index.cpu())
        self.positions += batch.positions
        self.finished.append(batch.responses.finished.float().cpu())

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        now = perf_counter()
        self.evaluated += now - self.evaluating
        grid, index = trainer.datamodule.grid, torch.cat(self.index)  # type: ignore[attr-defined]
        scores, metric = torch.cat(self.scores), module.metrics[FRONT]
        finite = scores.isfinite().all(-1)
        means = [scores[finite & (index == i)].double().mean(0).tolist() for i in range(len(grid))]
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(("front/", "information/"))}
        slopes = t_interval(preference_slopes(scores, index, torch.tensor(self.positions), grid.cpu()))  # (K, K) each
        obedience = {
            f"slope{suffix}/{name}": float(part[k, k])
            for k, name in enumerate(module.names)
            for suffix, part in zip(("", "_low", "_high"), slopes, strict=True)
        }
        side_effects = {
            f"side/{other} on {name}": float(slopes[0][j, k])
            for j, name in enumerate(module.names)
            for k, other in enumerate(module.names)
            if j != k and len(module.names) > 2  # of two, each is minus a slope
        }
        row = {
            "step": trainer.global_step,
            **logged,
            **obedience,
            **side_effects,
            "finished": torch.cat(self.finished).mean().item(),
            "overlap": reward_overlap(scores, index, grid).item(),
            "kl": torch.cat(self.kl).mean().item(),
            "length": torch.cat(self.lengths).mean().item(),
            "scored_responses": trainer.datamodule.scored_responses,  # type: ignore[attr-defined]
            "seconds": now - self.begin - self.evaluated if self.begin else 0.0,
            "grid": grid.tolist(),
            "front": means,
            "reference_point": metric.reference_point,
        }
        self.rows.append(row)
        with (self.folder / EVALUATIONS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._clear()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.interrupted or not self.rows:
            return
        last = {"step": trainer.global_step, **{key: self.rows[-1][key] for key in ("scored_responses", "seconds")}}
        part = self.folder / (RESULT + ".part")
        part.write_text(json.dumps(last | {"names": list(pl_module.names)} | self.origin))
        part.replace(self.folder / RESULT)  # whole or not at all
