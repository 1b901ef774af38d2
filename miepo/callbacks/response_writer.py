"""Answers to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from miepo.errors import UserError


class ResponseWriter(BasePredictionWriter):
    """Writes the answers of ``predict`` as JSON lines, as they come.

    Args:
        path: The file; with several processes each beyond the first adds its rank to the name.
        overwrite: Replace a file that exists.
    """

    def __init__(self, path: str = "answers.jsonl", overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.path, self.overwrite = Path(path), overwrite

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "predict":
            return
        rank = trainer.global_rank
        self.target = self.path.with_stem(f"{self.path.stem}_{rank}") if rank else self.path
        try:
            if self.target.exists() and not self.overwrite:
                raise UserError(
                    f"expected a new file for the answers, got '{self.target}', which exists (writer.overwrite: true)"
                )
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.target.write_text("", encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write the answers to {str(self.target)[:200]!r}: {reason}") from None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        prediction: Sequence[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self.target.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        rank_zero_info(f"Answers: {self.target}")
