"""Where a run stands."""

from __future__ import annotations

from math import ceil, inf
from typing import Any

from lightning.pytorch import Trainer


def place_in_run(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch with which training goes on, and how many of its batches are done.

    Of a run that was resumed, too.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress
    if epoch.ready == epoch.processed:  # between two epochs
        return epoch.processed, 0
    if batches.is_last_batch:  # all batches are done, but the epoch was not closed when the checkpoint was written
        return epoch.processed + 1, 0
    return epoch.processed, batches.current.processed


def place_in_steps(trainer: Trainer) -> int:
    """Return optimiser steps of the run, as it is configured now, that lie before its place; at the start of training.

    Those that it took, unless batches or steps had another size before: then as many as have the same share of all.
    """
    epoch, batches = place_in_run(trainer)
    if trainer.max_epochs in (None, -1) or trainer.num_training_batches == inf:
        return trainer.global_step
    per_epoch = ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if -1 < trainer.max_steps <= per_epoch * trainer.max_epochs:
        return trainer.global_step
    return epoch * per_epoch + batches // trainer.accumulate_grad_batches
