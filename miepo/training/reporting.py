"""How callbacks reach the loggers, whichever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from miepo.errors import UserError, short


def log_evaluation(trainer: Trainer, module: Any, metrics: Mapping[str, Any]) -> None:
    """Log the figures of one evaluation by Lightning's own way, and to the loggers directly before training.

    Lightning keeps what is logged in its sanity check from the loggers. Here the sanity check over the whole
    validation set is the evaluation before training, which is half of every comparison. What has dimensions is no
    number to log: the module's :class:`~miepo.evaluation.Evaluation` has it.
    """
    numbers = {}
    for key, value in metrics.items():
        if key in module.measured:
            raise UserError(f"the figure {key} of an evaluation is returned by two callbacks: expected another name")
        try:
            module.measured[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"the figure {key} of an evaluation must be a number or a tensor, got {short(value)}"
            ) from None
        if not module.measured[key].dim():
            numbers[key] = value
    module.log_dict(numbers, on_step=False, on_epoch=True)
    if trainer.sanity_checking and trainer.global_step == 0:  # before a run that goes on there is nothing new
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in numbers.items()}, step=trainer.global_step)


def whole_evaluation(trainer: Trainer) -> bool:
    """Return whether the evaluation covers the whole set: Lightning's sanity check may take a part of it."""
    return not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")


def log_image(trainer: Trainer, key: str, path: Path) -> None:
    """Give a picture to every logger that takes pictures."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [str(path)], step=trainer.global_step)


def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Give a table to every logger that takes tables."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows], step=trainer.global_step)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run's files, as the first process knows it; no process waits for another here."""
    logger: Any = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    if getattr(logger, "log_dir", None) is not None:
        return Path(logger.log_dir)
    return Path(logger.save_dir) / str(logger.name) / str(logger.version)  # W&B: one folder for all its runs


def grid_of(trainer: Any, user: object) -> Tensor:
    """Return the preference vectors ``(M, K)`` of the run's evaluations.

    Raises:
        UserError: names ``user``, which measures answers along them; the data has none.
    """
    data = trainer.datamodule
    if not hasattr(data, "grid"):
        raise UserError(
            f"{type(user).__name__} needs data whose evaluations answer along preferences, such as "
            f"OnlinePreferenceDataModule, got {type(data).__name__}"
        )
    return data.grid


def log_versions(trainer: Trainer) -> list[dict[str, Any]]:
    """Return class and version of every logger, by which a resumed run logs on where it was."""
    return [{"class": type(logger).__name__, "version": logger.version} for logger in trainer.loggers]
