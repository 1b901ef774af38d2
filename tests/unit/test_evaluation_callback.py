"""A figure of one's own in ten lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from miepo.callbacks import EvaluationCallback
from miepo.recorded import specification
from tests.helpers.fit import tiny_run


class Words(EvaluationCallback):
    """Logs how many words the answers have."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.calls: list[str] = []

    def start(self, trainer, module, grid) -> None:
        self.calls.append(f"start {tuple(grid.shape)}")

    def on_evaluation_batch(self, trainer, module, batch) -> None:
        self.counts += [len(texts[0].split()) for texts in batch.responses.texts]

    def on_evaluation_end(self, trainer, module) -> dict[str, float]:
        figure, self.counts = sum(self.counts) / len(self.counts), []
        self.calls.append("end")
        return {"answer/words": figure}

    def after_evaluation(self, trainer, module) -> None:
        self.calls.append(f"after {'answer/words' in trainer.callback_metrics}")


def fit(model: Path, folder: Path, callback: Callback, **settings: Any) -> Trainer:
    trainer = {"callbacks": [callback], "max_steps": 2, "limit_val_batches": 1.0} | settings
    run = tiny_run(model, folder, data={"grid": 3}, trainer=trainer)
    run[0].fit(run[1], run[2])
    return run[0]


@pytest.mark.parametrize(("check", "times"), [(0, 1), (1, 1), (-1, 2)])
def test_its_figures_are_logged_at_every_whole_evaluation(
    tiny_model: Path, tmp_path: Path, check: int, times: int
) -> None:
    """A sanity check over a part of the set is none; over the whole it is the evaluation before training."""
    words = Words()
    trainer = fit(tiny_model, tmp_path, words, num_sanity_val_steps=check)
    assert words.calls == ["start (3, 2)", *["end", "after True"] * times]
    assert trainer.callback_metrics["answer/words"] >= 0
    words.calls.clear()
    trainer.test(trainer.lightning_module, trainer.datamodule, verbose=False)
    assert words.calls == ["start (3, 2)", "end", "after True"]
    assert specification(words)["class_path"].endswith("Words")
