"""How callbacks reach the loggers, whichever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from miepo.errors import ObjectiveError, UserError

T = TypeVar("T")


def log_evaluation(trainer: Trainer, module: Any, metrics: Mapping[str, Any]) -> None:
    """Logs the figures of one evaluation by Lightning's own way, and to the loggers directly before training.

    Lightning keeps what is logged in its sanity check from the loggers. Here the sanity check over the whole
    validation set is the evaluation before training, which is half of every comparison.
    """
    module.log_dict(dict(metrics), on_step=False, on_epoch=True)
    if trainer.sanity_checking and trainer.global_step == 0:  # before a run that goes on there is nothing new
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in metrics.items()}, step=trainer.global_step)


def log_image(trainer: Trainer, key: str, path: Path) -> None:
    """Gives a picture to every logger that takes pictures."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [str(path)], step=trainer.global_step)


def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Gives a table to every logger that takes tables."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows], step=trainer.global_step)


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run's files, as the first process knows it; no process waits for another here."""
    logger: Any = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    if getattr(logger, "log_dir", None) is not None:
        return Path(logger.log_dir)
    return Path(logger.save_dir) / str(logger.name) / str(logger.version)  # W&B: one folder for all its runs


def grid_of(trainer: Any, user: object) -> Tensor:
    """The preference vectors ``(M, K)`` of the run's evaluations.

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


def whole_evaluation(hook: Callable[..., None]) -> Callable[..., None]:
    """Runs an evaluation hook unless Lightning's sanity check covers a part of the validation set only.

    ``trainer.num_sanity_val_steps: -1`` makes it cover the whole set, which is the evaluation before training.
    """

    @wraps(hook)
    def run(self: Any, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf"):
            hook(self, trainer, *args)

    return run


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """What every process has, in the order of their ranks; to be called by all of them."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def gathered_rows(trainer: Trainer, rows: Sequence[T]) -> list[T]:
    """The rows of all processes, one after the other."""
    return [row for part in gathered(trainer, rows) for row in part]


def together(trainer: Trainer, function: Callable[[], T]) -> T:
    """Calls ``function`` on every process; what one raises all raise, so that none waits for the others."""
    error: Exception | None = None
    try:
        value = function()
    except Exception as caught:
        error = caught
    found = [e for e in gathered(trainer, None if error is None else str(error)) if e is not None]
    if error is not None:
        raise error
    if found:
        raise ObjectiveError(f"another process ended: {found[0]}")
    return value


def over_processes(
    strategy: Any, values: Mapping[str, Tensor], counts: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means of what all processes have seen together, NaN left out, and sums of their counts; one exchange for all.

    Args:
        strategy: Of the trainer.
        values: Any number of values under each name; the names are the same on all processes.
        counts: One number under each name.
    """
    device = strategy.root_device
    sums = [value.to(device).double().nansum() for value in values.values()]
    seen = [(~value.isnan()).sum().to(device).double() for value in values.values()]
    rest = [torch.tensor(count, dtype=torch.float64, device=device) for count in counts.values()]
    total = strategy.reduce(torch.stack([*sums, *seen, *rest]), reduce_op="sum")
    n = len(values)
    means = (total[:n] / total[n : 2 * n]).float()  # 0 / 0 is NaN
    return dict(zip(values, means, strict=True)), dict(zip(counts, total[2 * n :].float(), strict=True))


def log_versions(trainer: Trainer) -> list[dict[str, Any]]:
    """Class and version of every logger, by which a resumed run logs on where it was."""
    return [{"class": type(logger).__name__, "version": logger.version} for logger in trainer.loggers]
