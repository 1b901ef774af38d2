"""What several processes of a run do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from miepo.errors import ObjectiveError, UserError

T = TypeVar("T")


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """Return what every process has, in the order of their ranks; to be called by all of them."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def gathered_rows(trainer: Trainer, rows: Sequence[T]) -> list[T]:
    """Return the rows of all processes, one after the other."""
    return [row for part in gathered(trainer, rows) for row in part]


def together(trainer: Trainer, function: Callable[[], T]) -> T:
    """Call ``function`` on every process; what one raises all raise, so that none waits for the others."""
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


def first_process() -> bool:
    """Return whether this is the first process of the run, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_first(function: Callable[[], T]) -> T:
    """Return what ``function`` gives on the first process; all wait for it, and what it raises all raise."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return function()
    found: list[Any] = [None, None]
    error: Exception | None = None
    if first_process():
        try:
            found[0] = function()
        except Exception as caught:
            error, found[1] = caught, str(caught)
    torch.distributed.broadcast_object_list(found)
    if error is not None:
        raise error
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def over_processes(
    strategy: Any, values: Mapping[str, Tensor], counts: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return means of what all processes have seen together, NaN left out, and sums of their counts.

    One exchange for all.

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
