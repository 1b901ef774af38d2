"""What a preference data set is to the rest: comparisons, filtered and split by rules that a seed fixes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from miepo.data.reading import read_rows
from miepo.errors import UserError
from miepo.recorded import Recorded
from miepo.seeding import RandomStream, generator

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Comparison:
    """A prompt with two responses, of which people preferred one."""

    prompt: str
    responses: tuple[str, str]
    preferred: int


class PreferenceDataset(Recorded, ABC):
    """A preference data set. A subclass says which fields it reads and what a row of them means.

    Prompts are split, not rows: a prompt that occurs twice never stands on both sides.

    Args:
        source: Any source of :func:`miepo.data.reading.read_rows`.
        train: Prompts to train on.
        test: Prompts to evaluate on. Where there are fewer prompts than ``train + test``, both parts shrink alike.
        test_source: Where the prompts to evaluate on come from; by default they are split off ``source``.
        seed: Fixes which prompts fall into which part.
    """

    fields: Mapping[str, type]
    blank: Sequence[str] = ()
    dialogue = False  # prompts are dialogues, which the policy's template must know

    def __init__(
        self, source: Any, train: int = 8000, test: int = 2000, test_source: Any = None, seed: int = 0
    ) -> None:
        for name, value in (("train", train), ("test", test)):
            if value < 1:
                raise UserError(f"{type(self).__name__}.{name} must be at least 1, got {value}")
        self.source, self.train, self.test, self.test_source, self.seed = source, train, test, test_source, seed

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Comparison | str:
        """Return what a row means, or, in two or three words, why it is left out."""

    # -- what others read ----------------------------------------------------------------------------------------------

    def comparisons(self, split: Split) -> list[Comparison]:
        """Return the comparisons of one part, prompt by prompt in a seeded order."""
        return self._parts[split]

    def prompts(self, split: Split) -> list[str]:
        """Return the prompts of one part, each once."""
        return list(dict.fromkeys(c.prompt for c in self._parts[split]))

    # -- how they are made ---------------------------------------------------------------------------------------------

    @cached_property
    def _parts(self) -> dict[str, list[Comparison]]:
        rows = _by_prompt(self._load(self.source, "train"))
        order = [list(rows)[i] for i in generator(RandomStream.SPLIT, self.seed).permutation(len(rows))]
        if self.test_source is None:
            train, test = _sizes(self.train, self.test, len(order))
            chosen, held_out, source = order[test : test + train], order[:test], rows
        else:
            source = {p: c for p, c in _by_prompt(self._load(self.test_source, "test")).items() if p not in rows}
            if not source:
                raise UserError(f"{type(self).__name__}: every test prompt is a training prompt, too")
            held_out = [list(source)[i] for i in generator(RandomStream.SPLIT, self.seed, 1).permutation(len(source))]
            chosen, held_out = order[: self.train], held_out[: self.test]
        if len(chosen) < self.train or len(held_out) < self.test:
            rank_zero_warn(
                f"{type(self).__name__}: {self.train} and {self.test} prompts were wanted, "
                f"there are {len(chosen)} to train and {len(held_out)} to evaluate on"
            )
        return {"train": [c for p in chosen for c in rows[p]], "test": [c for p in held_out for c in source[p]]}

    def _load(self, source: Any, split: Split) -> list[Comparison]:
        found = [self.read(row) for row in read_rows(source, self.fields, (split,), self.blank)]
        comparisons = [c for c in found if isinstance(c, Comparison)]
        reasons = Counter(c for c in found if isinstance(c, str))
        why = "".join(f", {n} left out ({reason})" for reason, n in sorted(reasons.items()))
        if not comparisons:
            raise UserError(f"{type(self).__name__}: expected comparisons in '{source}', got none{why}")
        rank_zero_info(f"{type(self).__name__}: {len(comparisons)} of {len(found)} rows of '{source}'{why}")
        return comparisons


def fingerprint_of(rows: Iterable[Any]) -> str:
    """Return a hash of rows of text: what was measured on them holds for these only."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def _by_prompt(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    result: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        result.setdefault(comparison.prompt, []).append(comparison)
    return result


def _sizes(train: int, test: int, available: int) -> tuple[int, int]:
    """Return both sizes, shrunk alike to what is available; either part keeps a prompt."""
    if available < 2:
        raise UserError(f"a split into two parts needs at least 2 prompts, got {available}")
    if available >= train + test:
        return train, test
    held_out = min(max(round(available * test / (train + test)), 1), available - 1)
    return available - held_out, held_out
