"""Prompts: from a list, a file or a data set, dealt out epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, inf
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from miepo.dialogue import dialogue_of
from miepo.errors import UserError
from miepo.preferences import Stream, generator
from miepo.rows import check_text, read_rows
from miepo.types import PromptBatch

Row = TypeVar("Row")


def load_prompts(
    source: Any, field: str = "prompt", splits: Sequence[str] = ("train",), dialogue: bool = False
) -> list[str]:
    """Prompts from any supported source, checked.

    Args:
        source: A list of strings; or any source of :func:`miepo.rows.read_rows`.
        field: Name of the column that holds the prompt.
        splits: Of a data set that has several, the first of these that it has.
        dialogue: Whether prompts of several messages are understood. A prompt may be a list of messages
            ``{"role": .., "content": ..}`` of user and assistant in turn.

    Raises:
        UserError: names the source, and for a file the line, that cannot be used.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError("the list of prompts: expected at least one prompt, got none")
        return [_prompt_text(prompt, f"prompt {i}", dialogue) for i, prompt in enumerate(source)]
    if not isinstance(source, str) and not hasattr(source, "column_names"):
        raise UserError(f"prompts must be a list, a .jsonl file or a data set, got {type(source).__name__}")
    rows = read_rows(source, {field: (str, list)}, splits)
    return [_prompt_text(row[field], f"{source}, prompt {i}", dialogue) for i, row in enumerate(rows, 1)]


def _prompt_text(prompt: Any, where: str, dialogue: bool) -> str:
    """A prompt as text: itself, or its messages as a dialogue of :mod:`miepo.dialogue`."""
    if isinstance(prompt, str):
        check_text(prompt, where, "prompt")
        return prompt
    if not isinstance(prompt, list):
        raise UserError(f"{where}: expected text or a list of messages, got {type(prompt).__name__}")
    messages = []
    for i, message in enumerate(prompt):
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role != ("user", "assistant")[i % 2] or not isinstance(content, str):
            raise UserError(
                f"{where}: expected messages of user and assistant in turn, with text as content, got {message!r:.80}"
            )
        check_text(content, where, "message")
        messages.append((role, content))
    if len(messages) % 2 == 0:
        raise UserError(f"{where}: expected a last message of the user, got {len(messages)} messages")
    if len(messages) > 1 and not dialogue:
        raise UserError(f"{where}: expected policy.dialogue true for a prompt of {len(messages)} messages, got false")
    return dialogue_of(messages) if dialogue else messages[0][1]


def split_rows(
    rows: Sequence[Row], validation_fraction: float, seed: int, prompt: Callable[[Row], str] = str
) -> tuple[list[Row], list[Row]]:
    """A seeded split of prompts or examples into training and validation, so that no prompt stands in both.

    Args:
        rows: Prompts or examples.
        validation_fraction: Share of the distinct prompts that is held out; both parts keep at least one.
        seed: Of the split.
        prompt: The prompt of a row; by default the row is one.
    """
    distinct = list(dict.fromkeys(map(prompt, rows)))
    if len(distinct) < 2:
        raise UserError(f"a split into training and validation needs at least 2 prompts, got {len(distinct)}")
    count = min(max(round(validation_fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = {distinct[i] for i in generator(Stream.SPLIT, seed).permutation(len(distinct))[:count]}
    return [r for r in rows if prompt(r) not in held_out], [r for r in rows if prompt(r) in held_out]


def say_repeated(prompts: Sequence[str], held_out: Sequence[str]) -> None:
    """Tells of training prompts that occur more than once, and warns of those that are evaluated on, too."""
    distinct = set(prompts)
    if repeated := len(prompts) - len(distinct):
        rank_zero_info(f"{repeated} of {len(prompts)} training prompts repeat another one")
    if both := len(distinct.intersection(held_out)):
        rank_zero_warn(f"{both} prompts are in training and in validation: expected other prompts to evaluate on")


def place_in_run(trainer: Trainer) -> tuple[int, int]:
    """Epoch with which training goes on, and how many of its batches are done: of a run that was resumed, too."""
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress
    if epoch.ready == epoch.processed:  # between two epochs
        return epoch.processed, 0
    if batches.is_last_batch:  # all batches are done, but the epoch was not closed when the checkpoint was written
        return epoch.processed + 1, 0
    return epoch.processed, batches.current.processed


def place_in_steps(trainer: Trainer) -> int:
    """Optimiser steps of the run, as it is configured now, that lie before its place; at the start of training.

    Those that it took, unless batches or steps had another size before: then as many as have the same share of all.
    """
    epoch, batches = place_in_run(trainer)
    if trainer.max_epochs in (None, -1) or trainer.num_training_batches == inf:
        return trainer.global_step
    per_epoch = ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if -1 < trainer.max_steps <= per_epoch * trainer.max_epochs:
        return trainer.global_step
    return epoch * per_epoch + batches // trainer.accumulate_grad_batches


class RunLoader(DataLoader):
    """A loader whose sampler knows where the run goes on, which Lightning takes on trust from one that has a state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to restore."""


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
        for left in range(self.count - 1, -1, -1):  # batches after this one, with at least one row each
            rows = len(self.mine) - start
            size = min(self.batch_size, rows - left) if left else rows
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
        """The prompt at ``position`` of the shuffle of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(Stream.SHUFFLE, self.seed, epoch).permutation(len(self.prompts)))
        return self.prompts[self._order[1][position]]

    @staticmethod
    def collate(rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        prompts, epochs, positions = zip(*rows, strict=True)
        return PromptBatch(prompts, epochs, positions)


class GridPrompts(Dataset):
    """Every (prompt, preference vector) pair, prompt by prompt, for evaluation and prediction; item ``[i, j, ..]`` is a
    batch."""

    def __init__(self, prompts: Sequence[str], grid: Tensor) -> None:
        self.prompts, self.grid = prompts, grid  # (M, K)

    def __len__(self) -> int:
        return len(self.prompts) * len(self.grid)

    def __getitem__(self, rows: Sequence[int]) -> PromptBatch:
        positions, indices = zip(*(divmod(row, len(self.grid)) for row in rows), strict=True)
        index = torch.tensor(indices)
        return PromptBatch([self.prompts[p] for p in positions], [0] * len(rows), positions, index, self.grid[index])
