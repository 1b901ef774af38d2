"""Prompts: from a list, a file or a data set, dealt out epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from miepo.errors import UserError
from miepo.preferences import Stream, generator
from miepo.rows import check_text, read_rows
from miepo.types import PromptBatch

Row = TypeVar("Row")


def load_prompts(source: Any, field: str = "prompt", split: str = "train") -> list[str]:
    """Prompts from any supported source, checked.

    Args:
        source: A list of strings; or any source of :func:`miepo.rows.read_rows`.
        field: Name of the column that holds the prompt.
        split: Split of a data set that has several.

    Raises:
        UserError: names the source, and for a file the line, that cannot be used.
    """
    if isinstance(source, (list, tuple)):
        for i, prompt in enumerate(source):
            if not isinstance(prompt, str):
                raise UserError(f"prompt {i}: expected text, got {type(prompt).__name__}")
            check_text(prompt, f"prompt {i}", "prompt")
        if not source:
            raise UserError("the list of prompts: expected at least one prompt, got none")
        return list(source)
    if not isinstance(source, str) and not hasattr(source, "column_names"):
        raise UserError(f"prompts must be a list, a .jsonl file or a data set, got {type(source).__name__}")
    return [row[field] for row in read_rows(source, {field: str}, split)]


def split_rows(rows: Sequence[Row], validation_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded split of prompts or examples into training and validation; both parts keep at least one."""
    if len(rows) < 2:
        raise UserError(f"a split into training and validation needs at least 2 prompts, got {len(rows)}")
    order = generator(Stream.SPLIT, seed).permutation(len(rows))
    held_out = min(max(round(validation_fraction * len(rows)), 1), len(rows) - 1)
    return [rows[i] for i in sorted(order[held_out:])], [rows[i] for i in sorted(order[:held_out])]


class OnlinePrompts(Dataset):
    """Training prompts; item ``i`` is the ``i``-th prompt of the current epoch's shuffle.

    The shuffle is a function of (seed, epoch) and the position travels with the prompt, so it does not matter who
    reads which item.
    """

    def __init__(self, prompts: Sequence[str], seed: int, epoch: Callable[[], int]) -> None:
        self.prompts, self.seed, self.epoch = prompts, seed, epoch
        self._order: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> tuple[str, int, int]:
        epoch = self.epoch()
        return self.at(epoch, position), epoch, position

    def at(self, epoch: int, position: int) -> str:
        """The prompt at ``position`` of the shuffle of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(Stream.SHUFFLE, self.seed, epoch).permutation(len(self.prompts)))
        return self.prompts[self._order[1][position]]

    @staticmethod
    def collate(rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        prompts, epochs, positions = zip(*rows, strict=True)
        return PromptBatch(prompts, epochs, positions)


class GridPrompts(Dataset):
    """Every (prompt, preference vector) pair, prompt by prompt, for evaluation and prediction."""

    def __init__(self, prompts: Sequence[str], grid: Tensor) -> None:
        self.prompts, self.grid = prompts, grid  # (M, K)

    def __len__(self) -> int:
        return len(self.prompts) * len(self.grid)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        position, grid_index = divmod(index, len(self.grid))
        return self.prompts[position], position, grid_index

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return (self[i] for i in range(len(self)))

    def collate(self, rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        prompts, positions, indices = zip(*rows, strict=True)
        index = torch.tensor(indices)
        return PromptBatch(prompts, [0] * len(rows), positions, index, self.grid[index])
