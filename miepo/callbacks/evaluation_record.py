"""Every evaluation with its answers, kept with the run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.errors import UserError
from miepo.evaluation import FOLDER, write_evaluation
from miepo.training.distributed import gathered_rows
from miepo.training.reporting import run_folder
from miepo.types import EvaluationBatch


class EvaluationRecord(EvaluationCallback):
    """Writes ``evaluations/step_000016.jsonl`` into the run's folder, with what was measured and what was answered.

    The first line is :meth:`~miepo.evaluation.Evaluation.state`: step, objectives, grid and every figure. Then there
    is a line for each prompt and preference vector, with ``prompt``, ``position`` (of the prompt in the evaluation
    set), ``grid_index``, ``preference`` by objective name, ``response``, whether it ``finished`` before the token
    limit, and ``rewards`` by name, normalised, null where there is none. An evaluation outside of training is
    ``validate.jsonl`` or ``test.jsonl``.

    Args:
        prompts: Keep the answers to this many prompts at most; all by default, none with 0.
    """

    along_preferences = False

    def __init__(self, prompts: int | None = None) -> None:
        if prompts is not None and prompts < 0:
            raise UserError(f"record.prompts must not be negative, got {prompts}")
        self.prompts = prompts
        self.rows: list[dict[str, Any]] = []

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: Any) -> None:
        if not isinstance(batch, EvaluationBatch) or batch.scores is None:  # of a stage without preferences
            return
        names, scores = module.names, batch.scores
        for i, position in enumerate(batch.positions):
            if self.prompts is not None and position >= self.prompts:
                continue
            weights = batch.preference[i].double().round(decimals=6).tolist()
            rewards = [r if r == r else None for r in scores[i].tolist()]  # JSON knows no NaN
            self.rows.append(
                {
                    "prompt": batch.prompts[i],
                    "position": position,
                    "grid_index": int(batch.grid_index[i]),
                    "preference": dict(zip(names, weights, strict=True)),
                    "response": batch.responses.texts[i][0],
                    "finished": bool(batch.responses.finished[i, 0]),
                    "rewards": dict(zip(names, rewards, strict=True)),
                }
            )

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> None:
        rows = gathered_rows(trainer, self.rows)
        self.rows = sorted(rows, key=lambda row: (row["position"], row["grid_index"]))

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and module.evaluation is not None:
            write_evaluation(run_folder(trainer) / FOLDER, module.evaluation, self.rows)
        self.rows = []
