"""The order in which a run takes its prompts, epoch by epoch and process by process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from miepo.errors import UserError
from miepo.seeding import RandomStream, generator
from miepo.types import PromptBatch


class RunLoader(DataLoader):
    """A loader whose sampler knows where the run goes on, which Lightning takes on trust from one that has a state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: there is nothing to restore."""


class RunPositions(DistributedSampler):
    """(epoch, position) of the training prompts of one process, from the place that the run has reached.

    The ``r``-th of ``W`` processes takes every ``W``-th position, so that the batches of all processes together are
    those of one process with a batch ``W`` times as large. Each has as many as the others: fewer than ``W`` prompts at
    the end of an epoch are left out.

    Args:
        size: Prompts in all.
        batch_size: Of one process.
        place: Epoch and finished batches, :func:`place_in_run`.
        rank: ``r``.
        processes: ``W``.
    """

    def __init__(
        self, size: int, batch_size: int, place: Callable[[], tuple[int, int]], rank: int = 0, processes: int = 1
    ) -> None:
        if size < processes:
            raise UserError(f"expected at least one prompt for each of {processes} processes, got {size}")
        super().__init__(range(size), processes, rank, shuffle=False, drop_last=True)  # type: ignore[arg-type]
        self.mine = range(rank, size // processes * processes, processes)
        self.batch_size, self.place = batch_size, place

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch, batches = self.place()  # at the first batch, when Lightning has restored it
        yield from ((epoch, position) for position in self.mine[batches * self.batch_size :])


class EvaluationShare(DistributedSampler):
    """Batches of every ``W``-th row of an evaluation, without the repetitions that would make all shares alike.

    Every process has the same number of batches, since with a sharded network they compute together.

    Args:
        size: Rows in all.
        batch_size: Of one process; a process with fewer rows than others fills its batches less.
        rank: Of this process.
        processes: ``W``.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        if size < processes:
            raise UserError(f"expected an evaluation of at least one row for each of {processes} processes, got {size}")
        super().__init__(range(size), processes, rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = range(rank, size, processes)
        self.batch_size = batch_size
        # batches of one row cannot be filled less: where shares differ, there is one batch fewer
        fullest = -(-size // processes)
        self.count = min(-(-fullest // batch_size), size // processes)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        start = 0
        for remaining in range(self.count - 1, -1, -1):  # batches after this one, with at least one row each
            rows = len(self.mine) - start
            size = min(self.batch_size, rows - remaining) if remaining else rows
            yield list(self.mine[start : start + size])
            start += size


class OnlinePrompts(Dataset):
    """Training prompts; item ``(epoch, i)`` is the ``i``-th prompt of that epoch's shuffle.

    The shuffle is a function of (seed, epoch) and the place travels with the prompt, so it does not matter who reads
    which item.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._order: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, place: tuple[int, int]) -> tuple[str, int, int]:
        return self.at(*place), *place

    def at(self, epoch: int, position: int) -> str:
        """Return the prompt at ``position`` of the shuffle of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(RandomStream.SHUFFLE, self.seed, epoch).permutation(len(self.prompts)))
        return self.prompts[self._order[1][position]]

    @staticmethod
    def collate(rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        """Return a batch of rows (prompt, epoch, position)."""
        prompts, epochs, positions = zip(*rows, strict=True)
        return PromptBatch(prompts, epochs, positions)


class GridPrompts(Dataset):
    """Every (prompt, preference vector) pair, prompt by prompt, for evaluation and prediction.

    Item ``[i, j, ..]`` is a batch.
    """

    def __init__(self, prompts: Sequence[str], grid: Tensor) -> None:
        self.prompts, self.grid = prompts, grid  # (M, K)

    def __len__(self) -> int:
        return len(self.prompts) * len(self.grid)

    def __getitem__(self, rows: Sequence[int]) -> PromptBatch:
        positions, indices = zip(*(divmod(row, len(self.grid)) for row in rows), strict=True)
        index = torch.tensor(indices)
        return PromptBatch([self.prompts[p] for p in positions], [0] * len(rows), positions, index, self.grid[index])
