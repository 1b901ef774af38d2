"""How far the run is, in lines, where the output is a file or a pipe and no bar can be drawn."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from miepo.errors import UserError
from miepo.types import PreferenceBatch


def duration(seconds: float) -> str:
    """Return a duration as people read it.

    >>> duration(7.4), duration(432), duration(7300)
    ('7 s', '7 min 12 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class ProgressLog(Callback):
    """Prints a line with step, time left and the rewards of the step, where standard error is no terminal.

    The time left is that of the steps, as fast as they were, without evaluations to come.

    Args:
        every_n_seconds: A line for the first step, for the last, and for a step that ends so long after the last line.
    """

    def __init__(self, every_n_seconds: float = 20.0) -> None:
        if not every_n_seconds >= 0:
            raise UserError(f"progress.every_n_seconds must not be negative, got {every_n_seconds}")
        self.every_n_seconds = every_n_seconds
        self.said = self.training = self.mark = 0.0
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.said, self.training, self.steps = float("-inf"), 0.0, 0
        self.mark = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.training += perf_counter() - self.mark

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.mark = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if sys.stderr.isatty():
            return
        now = perf_counter()
        self.training, self.mark, self.steps = self.training + now - self.mark, now, self.steps + 1
        total = trainer.estimated_stepping_batches
        if now - self.said < self.every_n_seconds and trainer.global_step < total:
            return
        self.said = now
        accumulated = max(trainer.accumulate_grad_batches, 1)
        seconds_left = max(total - trainer.global_step, 0) * accumulated * self.training / self.steps
        parts = [f"step {trainer.global_step} of {total:g}", f"{duration(seconds_left)} left"]
        if isinstance(batch, PreferenceBatch):
            parts += [
                f"{n} {v:+.2f}" for n, v in zip(pl_module.names, batch.scores.nanmean((0, 1)).tolist(), strict=True)
            ]
        rank_zero_info(", ".join(parts))
