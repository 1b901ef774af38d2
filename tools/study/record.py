"""What a study keeps of a run: one row per evaluation, written as it happens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import permutations
from math import nan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from miepo.callbacks import EvaluationCallback, ParetoFront, Steerability
from miepo.callbacks.preference_information import grid_log_prob, read_by_prompt
from miepo.errors import UserError
from miepo.evaluation import Evaluation
from miepo.metrics import reward_overlap
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
        self.slopes: Steerability | None = None  # where the run itself measures none
        self.begin = self.evaluating = self.evaluated = 0.0
        self.rows: list[dict[str, Any]] = []
        self._clear()

    def _clear(self) -> None:
        self.scores: list[Tensor] = []
        self.index: list[Tensor] = []
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

    def start(self, trainer: Trainer, module: Any, grid: Tensor) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ParetoFront) for callback in callbacks):
            raise UserError(
                "a study compares fronts: expected miepo.callbacks.ParetoFront among the callbacks, got none"
            )
        if not any(isinstance(callback, Steerability) for callback in callbacks):
            self.slopes = Steerability()
            self.slopes.start(trainer, module, grid)

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        if self.slopes:
            self.slopes.on_evaluation_batch(trainer, module, batch)
        self.kl.append(divergence(module.policy, batch, trainer.datamodule.grid).cpu())  # type: ignore[attr-defined]
        self.lengths.append(batch.responses.tokens.flat().mask.sum(-1).float().cpu())
        assert batch.scores is not None
        self.scores.append(batch.scores.cpu())
        self.index.append(batch.grid_index.cpu())
        self.finished.append(batch.responses.finished.float().cpu())

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> Mapping[str, Any] | None:
        return self.slopes and self.slopes.on_evaluation_end(trainer, module)

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        now = perf_counter()
        self.evaluated += now - self.evaluating
        evaluation: Evaluation = module.evaluation
        assert evaluation.means is not None  # start() has seen to it
        figures, names = evaluation.figures, module.names
        measured = {key: value for key, value in figures.items() if key.startswith(("front/", "information/"))}
        slopes = {
            f"slope{end}/{name}": figures.get(f"steerability/{name}{end}", nan)
            for name in names
            for end in ("", "_low", "_high")
        }
        side_effects = {
            f"side/{other} on {name}": figures.get(f"side_effect/{name}/{other}", nan)
            for name, other in permutations(names, 2)
            if len(names) > 2  # of two, each is minus a slope
        }
        row = {
            "step": trainer.global_step,
            **measured,
            **slopes,
            **side_effects,
            "finished": torch.cat(self.finished).mean().item(),
            "overlap": reward_overlap(torch.cat(self.scores), torch.cat(self.index), evaluation.grid).item(),
            "kl": torch.cat(self.kl).mean().item(),
            "length": torch.cat(self.lengths).mean().item(),
            "scored_responses": trainer.datamodule.scored_responses,  # type: ignore[attr-defined]
            "seconds": now - self.begin - self.evaluated if self.begin else 0.0,
            "grid": evaluation.grid.tolist(),
            "front": evaluation.means.tolist(),
            "reference_point": evaluation.reference_point,
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
