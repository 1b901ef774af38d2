"""What the policy says: the same prompts answered along the simplex."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.preferences import format_preference
from miepo.training.distributed import gathered_rows
from miepo.training.reporting import log_table
from miepo.types import EvaluationBatch


class _Row(NamedTuple):
    position: int  # of the prompt
    grid: int  # index of the preference vector
    prompt: str
    preference: Tensor  # (K,)
    text: str
    scores: list[float]
    whole: bool  # it ended by itself


class SampleTable(EvaluationCallback):
    """Logs the answers to the first evaluation prompts as a table, and prints those of opposite preferences at the end.

    Args:
        prompts: How many prompts the table holds.
        printed: How many of them are printed when training or evaluation ends: the first whose answers under opposite
            preferences ended by themselves; an answer that was cut at the token limit is marked.
    """

    def __init__(self, prompts: int = 4, printed: int = 2) -> None:
        self.prompts, self.printed = prompts, printed
        self.rows: list[_Row] = []
        self.last: list[_Row] = []

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        assert batch.scores is not None
        for i, (position, prompt) in enumerate(zip(batch.positions, batch.prompts, strict=True)):
            if position < self.prompts:
                text, scores, whole = (
                    batch.responses.texts[i][0],
                    batch.scores[i].tolist(),
                    batch.responses.finished[i, 0],
                )
                place = position, int(batch.grid_index[i])
                self.rows.append(_Row(*place, prompt, batch.preference[i].cpu(), text, scores, bool(whole)))

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> None:
        self.last, self.rows = sorted(gathered_rows(trainer, self.rows), key=lambda row: (row.position, row.grid)), []
        table = [
            (trainer.global_step, row.prompt, format_preference(row.preference, module.names), row.text, *row.scores)
            for row in self.last
        ]
        log_table(trainer, "samples", ["step", "prompt", "preference", "response", *module.names], table)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._print(pl_module)

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn != "fit":
            self._print(module)

    def _print(self, module: Any) -> None:
        shown = []  # of each prompt the answers at the largest weight of each objective
        for position in sorted({row.position for row in self.last}):
            rows = [row for row in self.last if row.position == position]
            shown.append([max(rows, key=lambda row: float(row.preference[k])) for k in range(len(module.names))])
        whole = [rows for rows in shown if all(row.whole for row in rows)]
        for rows in (whole + [rows for rows in shown if rows not in whole])[: self.printed]:
            rank_zero_info(f"\nPrompt: {rows[0].prompt}")
            for k, (name, row) in enumerate(zip(module.names, rows, strict=True)):
                text = (" ".join(row.text.split()) or "(empty)") + ("" if row.whole else " [cut]")
                rank_zero_info(f"  {name} (weight {row.preference[k]:.2f}): {text}")
