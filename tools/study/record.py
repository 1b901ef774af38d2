"""What a study keeps of a run: one row per evaluation, written as it happens."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from miepo.callbacks.pareto_front import METRIC as FRONT
from miepo.callbacks.reporting import whole_evaluation
from miepo.metrics import reward_overlap
from miepo.metrics.steerability import preference_slopes, t_interval
from miepo.types import EvaluationBatch
from tools.study import rows

EVALUATIONS, RESULT = "evaluations.jsonl", "result.json"
ROOT = Path(__file__).resolve().parents[2]


class Record(Callback):
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

    @whole_evaluation
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: EvaluationBatch, *_: Any
    ) -> None:
        policy, tokens = pl_module.policy, batch.responses.tokens.flat()  # (N, T)
        with policy.evaluating():
            own = policy.log_prob(policy.encode(batch.prompts, batch.preference), batch.preference, tokens).sum(-1)
            with policy.silent():
                plain = policy.encode(batch.prompts, batch.preference)
            base = policy.reference_log_prob(plain, tokens).sum(-1)
        self.kl.append((own - base).cpu())
        self.lengths.append(tokens.mask.sum(-1).float().cpu())
        assert batch.scores is not None
        self.scores.append(batch.scores.cpu())
        self.index.append(batch.grid_index.cpu())
        self.positions += batch.positions
        self.finished.append(batch.responses.finished.float().cpu())

    @whole_evaluation
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        now = perf_counter()
        self.evaluated += now - self.evaluating
        grid, index = trainer.datamodule.grid, torch.cat(self.index)  # type: ignore[attr-defined]
        scores, metric = torch.cat(self.scores), pl_module.metrics[FRONT]
        finite = scores.isfinite().all(-1)
        means = [scores[finite & (index == i)].double().mean(0).tolist() for i in range(len(grid))]
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(("front/", "information/"))}
        slopes = t_interval(preference_slopes(scores, index, torch.tensor(self.positions), grid.cpu()))  # (K, K) each
        obedience = {
            f"slope{suffix}/{name}": float(part[k, k])
            for k, name in enumerate(pl_module.names)
            for suffix, part in zip(("", "_low", "_high"), slopes, strict=True)
        }
        side_effects = {
            f"side/{other} on {name}": float(slopes[0][j, k])
            for j, name in enumerate(pl_module.names)
            for k, other in enumerate(pl_module.names)
            if j != k and len(pl_module.names) > 2  # of two, each is minus a slope
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
