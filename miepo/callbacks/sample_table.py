"""What the policy says: the same prompts answered along the simplex."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from miepo.callbacks.reporting import gathered_rows, log_table, whole_evaluation
from miepo.preferences import format_preference
from miepo.types import EvaluationBatch


class SampleTable(Callback):
    """Logs the answers to the first evaluation prompts as a table, and prints those of opposite preferences at the end.

    Args:
        prompts: How many prompts the table holds.
        printed: How many of them are printed when training or evaluation ends.
    """

    def __init__(self, prompts: int = 4, printed: int = 2) -> None:
        self.prompts, self.printed = prompts, printed
        self.rows: list[tuple[int, int, str, Tensor, str, list[float]]] = []
        self.last: list[tuple[int, int, str, Tensor, str, list[float]]] = []

    @whole_evaluation
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: EvaluationBatch, *_: Any
    ) -> None:
        assert batch.scores is not None
        for i, (position, prompt) in enumerate(zip(batch.positions, batch.prompts, strict=True)):
            if position < self.prompts:
                text, scores = batch.responses.texts[i][0], batch.scores[i].tolist()
                self.rows.append((position, int(batch.grid_index[i]), prompt, batch.preference[i].cpu(), text, scores))

    @whole_evaluation
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.last, self.rows = sorted(gathered_rows(trainer, self.rows), key=lambda row: row[:2]), []
        table = [
            (trainer.global_step, prompt, format_preference(w, pl_module.names), text, *scores)
            for _, _, prompt, w, text, scores in self.last
        ]
        log_table(trainer, "samples", ["step", "prompt", "preference", "response", *pl_module.names], table)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._print(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            self._print(pl_module)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def _print(self, module: Any) -> None:
        for position in range(self.printed):
            rows = [row for row in self.last if row[0] == position]
            if not rows:
                continue
            rank_zero_info(f"\nPrompt: {rows[0][2]}")
            for k, name in enumerate(module.names):
                _, _, _, preference, text, _ = max(rows, key=lambda row: float(row[3][k]))
                rank_zero_info(f"  {name} (weight {preference[k]:.2f}): {' '.join(text.split()) or '(empty)'}")
