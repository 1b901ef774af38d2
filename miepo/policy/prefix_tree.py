"""Sequences that begin alike, computed once: prompts and their responses as trees, laid out flat without padding.

All responses to a prompt continue one computation of it, and where preferences are text after the prompt, all
preferences, too. What a token sees is the path from its place to the root of its tree: ``attention.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from miepo.policy.tree_attention import Branches

Prompts = Sequence[Sequence[Sequence[int]]]  # B prompts as token ids, each under C preferences
Answers = Sequence[Sequence[Sequence[Sequence[int]]]]  # n responses to each prompt under each preference


@dataclass(frozen=True)
class Packed:
    """Trees, one after the other, in ``L`` places, and where the response tokens are in them.

    ``n`` response tokens in all; their log-probabilities are read from the states of the tokens before them.
    """

    ids: Tensor  # (1, L)
    positions: Tensor  # (1, L) in its own sequence, as if it were alone
    owner: Tensor  # (1, L) index among the B * C preferences of the one that a place belongs to; the first if shared
    sequence: Tensor  # (L,) index among B * (1 + n): a prompt, and then its responses
    token: Tensor  # (L,) place in the prompt or response
    branches: Branches  # what each place sees
    before: Tensor  # (n,) place of the token before each response token
    targets: Tensor  # (n,) the response tokens
    where: Tensor  # (n,) where they belong in the flat (B, n, C, T)


def tree_size(under: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], share: bool) -> int:
    """Return places that a prompt under its preferences, and its responses under each, take in :func:`pack`."""
    under = [prompt for prompt, each in zip(under, answers, strict=True) if any(each)]
    common = len(_common(under)) if share else 0
    prompts = common + sum(len(prompt) - common for prompt in under)
    return prompts + sum(max(len(answer) - 1, 0) for each in answers for answer in each)


def micro_batches(sizes: Sequence[int], limit: int, count: int = 1) -> list[slice]:
    """Divide trees, in this order, into groups of at most ``limit`` places, or of one tree that is larger.

    Args:
        sizes: In places.
        limit: Of places in a group.
        count: Make at least so many groups; where there are fewer trees, the last is in several.
    """
    groups, start, room = [], 0, limit
    for i, size in enumerate(sizes):
        if size > room and i > start:
            groups.append(slice(start, i))
            start, room = i, limit
        room -= size
    groups.append(slice(start, len(sizes)))
    while len(groups) < count:
        longest = max(groups, key=lambda g: g.stop - g.start)
        if longest.stop - longest.start == 1:
            return groups + [groups[-1]] * (count - len(groups))
        i, middle = groups.index(longest), (longest.start + longest.stop) // 2
        groups[i : i + 1] = [slice(longest.start, middle), slice(middle, longest.stop)]
    return groups


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all rows begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


@dataclass
class _Trees:
    """All trees, flat; a path lists the places from a root to the end of a run of tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    runs: list[tuple[list[int], int]] = field(default_factory=list)  # a path, and how many of its last places are new
    before: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    where: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], path: list[int], owner: int, sequence: int, first: int) -> list[int]:
        """Continue ``path`` with ``ids``, the tokens from ``first`` on of a prompt or response."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(len(path), len(path) + len(ids))
        self.owners += [owner] * len(ids)
        self.sequences += [sequence] * len(ids)
        self.tokens += range(first, first + len(ids))
        path = [*path, *range(start, len(self.ids))]
        if ids:
            self.runs.append((path, len(ids)))
        return path


def pack(
    prompts: Prompts,
    responses: Answers,
    width: int,
    share: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Packed:
    """Lay prompts under preferences and their responses out as trees.

    Args:
        prompts: ``B`` prompts as token ids, each under ``C`` preferences.
        responses: ``n`` responses to each prompt under each preference, token ids without padding; of those that are
            empty nothing is computed.
        width: ``T``, tokens of the longest response.
        share: Whether a token that two preferences have in common is computed alike under both: the adapter is not
            gated.
        dtype: In which attention is computed.
        device: Of the tensors.
    """
    trees = _Trees()
    for b, (under, answers) in enumerate(zip(prompts, responses, strict=True)):
        count = len(under)
        own = b * (1 + len(answers[0]))  # of the prompt, among the sequences
        for group in [[*range(count)]] if share else [[c] for c in range(count)]:
            group = [c for c in group if any(answers[c])]  # under which something is read
            if not group:
                continue
            common = _common([under[c] for c in group])
            root = trees.add(common, [], b * count + group[0], own, 0)
            for c in group:
                owner = b * count + c
                prompt = trees.add(under[c][len(common) :], root, owner, own, len(common))
                for i, answer in enumerate(answers[c]):
                    place = len(trees.ids)
                    trees.add(answer[:-1], prompt, owner, own + 1 + i, 0)  # nothing is predicted after its last token
                    trees.before += [prompt[-1], *range(place, len(trees.ids))][: len(answer)]
                    trees.targets += answer
                    first = ((b * len(answers[c]) + i) * count + c) * width
                    trees.where += range(first, first + len(answer))

    def flat(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.long)

    return Packed(
        flat(trees.ids).unsqueeze(0),
        flat(trees.positions).unsqueeze(0),
        flat(trees.owners).unsqueeze(0),
        flat(trees.sequences),
        flat(trees.tokens),
        Branches.of(trees.runs, dtype, device),
        flat(trees.before),
        flat(trees.targets),
        flat(trees.where),
    )
