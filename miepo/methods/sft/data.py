"""Given responses in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from miepo.data.datasets import PreferenceDataset
from miepo.data.datasets.base import Split
from miepo.data.module import check_dialogue
from miepo.data.prompts import say_repeated, split_rows
from miepo.data.reading import read_rows
from miepo.data.samplers import EvaluationShare, RunLoader
from miepo.errors import UserError
from miepo.policy import Policy
from miepo.recorded import Recorded
from miepo.seeding import RandomStream, generator
from miepo.training.progress import place_in_run
from miepo.types import SupervisedBatch, Tokens

VALIDATION = 0.05  # share of a file of examples that is held out


def length_batches(
    lengths: Sequence[int], batch_size: int, rng: np.random.Generator, window: int = 50
) -> list[list[int]]:
    """Return shuffled batches of rows of like length: ``window`` batches at a time are sorted and dealt out.

    Args:
        lengths: Of the rows, in tokens.
        batch_size: Rows per batch; the last batch may have fewer.
        rng: Fixes the shuffle.
        window: Batches among which rows are sorted: more saves more padding, fewer mixes better.

    Returns:
        Indices of the rows; each row is in one batch.
    """
    order = rng.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), window * batch_size):
        part = sorted(order[start : start + window * batch_size], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class SupervisedDataModule(Recorded, LightningDataModule):
    """Prompts with the responses to imitate, in batches of like length.

    Args:
        examples: A preference data set of :mod:`miepo.data.datasets`, or a file with ``prompt`` and ``response``.
        validation_examples: The same for evaluation; by default the test part of a preference data set, or a seeded
            twentieth of the file.
        responses: Of a preference data set: the ``preferred`` response of each pair, or ``all``.
        validation_limit: Evaluate on this many examples at most.
        batch_size: Examples per step and process.
        max_response_tokens: A response is cut after this many tokens, without an end token then.
        max_tokens: Examples with more tokens than this, prompt and response, are left out; by default what fits the
            model's context.
        seed: Fixes the order.
    """

    def __init__(
        self,
        examples: PreferenceDataset | str,
        validation_examples: PreferenceDataset | str | None = None,
        responses: Literal["preferred", "all"] = "preferred",
        validation_limit: int | None = 500,
        batch_size: int = 64,
        max_response_tokens: int = 512,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size), ("max_response_tokens", max_response_tokens), ("max_tokens", max_tokens),
            ("validation_limit", validation_limit),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        self.examples, self.validation_examples, self.responses = examples, validation_examples, responses
        self.validation_limit, self.batch_size, self.seed = validation_limit, batch_size, seed
        self.max_response_tokens, self.max_tokens = max_response_tokens, max_tokens

    def setup(self, stage: str) -> None:
        """Read everything, so that a mistake shows before a model is loaded."""
        self.train_set = self._read(self.examples, "train")
        if self.validation_examples is not None:
            held_out = self._read(self.validation_examples, "test")
        elif isinstance(self.examples, PreferenceDataset):
            held_out = self._read(self.examples, "test")
        else:
            self.train_set, held_out = split_rows(self.train_set, VALIDATION, self.seed, itemgetter(0))
        say_repeated([prompt for prompt, _ in self.train_set], [prompt for prompt, _ in held_out])
        self.validation_set = held_out[: self.validation_limit]

    @property
    def _policy(self) -> Policy:
        trainer: Any = self.trainer
        return trainer.lightning_module.policy

    def _read(self, source: PreferenceDataset | str, split: Split) -> list[tuple[str, str]]:
        if isinstance(source, PreferenceDataset):
            check_dialogue(source, self._policy)
            found = source.comparisons(split)
            which = [(c.preferred,) if self.responses == "preferred" else (0, 1) for c in found]
            pairs = [(c.prompt, c.responses[i]) for c, chosen in zip(found, which, strict=True) for i in chosen]
        else:
            rows = read_rows(source, {"prompt": str, "response": str}, blank=["response"])
            pairs = [(row["prompt"], row["response"]) for row in rows]
        pairs = list(dict.fromkeys((p, r) for p, r in pairs if r.strip()))
        if not pairs:
            raise UserError("expected responses to imitate, got empty ones alone")
        return pairs

    def train_dataloader(self) -> DataLoader:
        rows = self._tokenised(self.train_set, "training")
        trainer: Any = self.trainer
        lengths = [prompt_length + len(ids) for _, ids, prompt_length in rows]
        batches = _Batches(
            lengths, self.batch_size, self.seed, lambda: place_in_run(trainer), trainer.global_rank, trainer.world_size
        )
        # of responses, on average, in one process
        self.tokens_per_batch = sum(len(ids) for _, ids, _ in rows) / len(batches) / trainer.world_size
        return RunLoader(_Examples(rows), batch_size=None, sampler=batches, collate_fn=self._collate)

    def val_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        rows = sorted(self._tokenised(self.validation_set, "validation"), key=lambda row: row[2] + len(row[1]))
        share = EvaluationShare(len(rows), self.batch_size, trainer.global_rank, trainer.world_size)
        return DataLoader(_Examples(rows), batch_size=None, sampler=share, collate_fn=self._collate)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _tokenised(self, pairs: Sequence[tuple[str, str]], use: str) -> list[tuple[str, list[int], int]]:
        """Return prompt, tokens of the response, number of tokens of the prompt."""
        policy = self._policy
        limit = min(self.max_tokens or 10**9, policy.context_length or 10**9)
        rows = []
        for prompt, response in pairs:
            prompt_length = len(policy.template.encode(prompt))
            ids = [*policy.template.encode_response(prompt, "", response), policy.end_id]
            rows.append((prompt, ids[: self.max_response_tokens], prompt_length))
        fitting = [row for row in rows if row[2] + len(row[1]) <= limit]
        if not fitting:
            raise UserError(f"no {use} example of {len(rows)} has at most {limit} tokens, prompt and response")
        if len(fitting) < len(rows):
            rank_zero_warn(
                f"{len(rows) - len(fitting)} of {len(rows)} {use} examples have over {limit} tokens; left out"
            )
        return fitting

    def _collate(self, rows: Sequence[tuple[str, list[int], int]]) -> SupervisedBatch:
        prompts, ids, _ = zip(*rows, strict=True)
        tokens = Tokens.of_rows(ids, self._policy.tokenizer.pad_token_id)
        return SupervisedBatch(prompts, tokens, torch.zeros(len(rows), 0))

    def transfer_batch_to_device(
        self, batch: SupervisedBatch, device: torch.device, dataloader_idx: int
    ) -> SupervisedBatch:
        return SupervisedBatch(batch.prompts, batch.responses.to(device), batch.scores.to(device))


class _Examples(Dataset):
    """Item ``[i, j, ..]`` is a batch."""

    def __init__(self, rows: Sequence[tuple[str, list[int], int]]) -> None:
        self.rows = rows

    def __getitem__(self, index: Sequence[int]) -> list[tuple[str, list[int], int]]:
        return [self.rows[i] for i in index]


class _Batches(DistributedSampler):
    """The batches of an epoch, a function of (seed, epoch), from the place that the run has reached.

    Of ``W`` processes each takes every ``W``-th row of batches that are ``W`` times as large; fewer than ``W`` rows at
    the end are left out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        place: Callable[[], tuple[int, int]],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(range(len(lengths)), processes, rank, shuffle=False)  # type: ignore[arg-type]
        self.lengths, self.seed, self.place = lengths, seed, place
        self.whole, self.mine = batch_size * processes, slice(rank, None, processes)
        self.count = -(-len(lengths) // self.whole) - (0 < len(lengths) % self.whole < processes)
        if not self.count:
            raise UserError(f"expected at least one example for each of {processes} processes, got {len(lengths)}")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        epoch, done = self.place()  # at the first batch, when Lightning has restored it
        rng = generator(RandomStream.SHUFFLE, self.seed, epoch)
        batches = length_batches(self.lengths, self.whole, rng)
        yield from (batch[self.mine] for batch in [b for b in batches if len(b) >= self.num_replicas][done:])
