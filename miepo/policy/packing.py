"""Sequences that begin alike, computed once: prompts and their responses as trees, packed in rows without padding.

All responses to a prompt continue one computation of it, and where preferences are text after the prompt, all
preferences, too. A tree is laid out flat; a mask lets every token see what lies on its path to the root, and nothing
else, so that the result is that of the sequences one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Trees in ``R`` rows of ``L`` places, and where the response tokens are in them.

    ``n`` response tokens in all; their log-probabilities are read from the states of the tokens before them.
    """

    ids: Tensor  # (R, L)
    positions: Tensor  # (R, L) in its own sequence, as if it were alone
    mask: Tensor  # (R, 1, L, L) True where a token sees another
    owner: Tensor  # (R, L) index among the B * C preferences of the one that a place belongs to; the first if shared
    before: Tensor  # (n,) place of the token before each response token, in the flat rows
    targets: Tensor  # (n,) the response tokens
    where: Tensor  # (n,) where they belong in the flat (B, n, C, T)


@dataclass
class _Tree:
    """A tree, flat; node j is a run of places that continues node ``parents[j]``."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    where: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, parent: int, owner: int) -> int:
        node = len(self.parents)
        self.parents.append(parent)
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.nodes += [node] * len(ids)
        self.owners += [owner] * len(ids)
        return node


def pack(
    prompts: Sequence[Sequence[Sequence[int]]],
    responses: Sequence[Sequence[Sequence[int]]],
    width: int,
    share: bool,
    device: torch.device | str = "cpu",
) -> Packed:
    """Prompts under preferences and their responses as trees in rows.

    Args:
        prompts: ``B`` prompts as token ids, each under ``C`` preferences.
        responses: ``n`` responses to each prompt, token ids without padding.
        width: ``T``, tokens of the longest response.
        share: Whether a token that two preferences have in common is computed alike under both: the adapter is not
            gated.
        device: Of the tensors.
    """
    trees = [
        tree
        for b, (under, answers) in enumerate(zip(prompts, responses, strict=True))
        for tree in _trees(b, under, answers, width, share)
    ]
    rows = _rows([len(tree.ids) for tree in trees])
    length = max(sum(len(trees[i].ids) for i in row) for row in rows)
    sight = max(sum(len(trees[i].parents) for i in row) for row in rows) + 1  # nodes of a row, and one for its end

    flat: list[list[list[int]]] = [[], [], [], []]  # ids, positions, owners and nodes, row by row
    seen: list[list[list[bool]]] = []
    before: list[int] = []
    for r, row in enumerate(rows):
        start, first = 0, 0
        columns: list[list[int]] = [[], [], [], []]
        visible = [[a == b for b in range(sight)] for a in range(sight)]
        for i in row:
            tree = trees[i]
            for j, parent in enumerate(tree.parents, first):
                if parent >= 0:
                    visible[j] = [a or b for a, b in zip(visible[j], visible[first + parent], strict=True)]
            for column, values in zip(columns, (tree.ids, tree.positions, tree.owners), strict=False):
                column += values
            columns[3] += [first + j for j in tree.nodes]
            before += [r * length + start + place for place in tree.before]
            start, first = start + len(tree.ids), first + len(tree.parents)
        rest = length - start
        for column, filler, out in zip(columns, (0, 0, 0, sight - 1), flat, strict=True):
            out.append(column + [filler] * rest)
        seen.append(visible)

    ids, positions, owner, node = torch.tensor(flat, device=device)  # (R, L) each
    row_index = torch.arange(len(rows), device=device)[:, None, None]
    mask = torch.tensor(seen, device=device)[row_index, node[:, :, None], node[:, None, :]]  # (R, L, L)
    mask &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    order = [i for row in rows for i in row]
    return Packed(
        ids,
        positions,
        mask.unsqueeze(1),
        owner,
        torch.tensor(before, device=device, dtype=torch.long),
        torch.tensor([t for i in order for t in trees[i].targets], device=device, dtype=torch.long),
        torch.tensor([w for i in order for w in trees[i].where], device=device, dtype=torch.long),
    )


def _trees(
    b: int, under: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], width: int, share: bool
) -> list[_Tree]:
    """One tree for a prompt under all preferences where they share, else one for each."""
    count = len(under)
    trees = []
    for group in [range(count)] if share else [[c] for c in range(count)]:
        tree = _Tree()
        columns = zip(*(under[c] for c in group), strict=False)
        common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        root = tree.add(common, 0, -1, b * count + group[0])
        for c in group:
            owner = b * count + c
            prompt = tree.add(under[c][len(common) :], len(common), root, owner)
            last = len(tree.ids) - 1 if len(under[c]) > len(common) else len(common) - 1
            for i, answer in enumerate(answers):
                place = len(tree.ids)
                tree.add(answer[:-1], len(under[c]), prompt, owner)  # nothing is predicted after its last token
                tree.before += [last, *range(place, len(tree.ids))][: len(answer)]
                tree.targets += answer
                first = ((b * len(answers) + i) * count + c) * width
                tree.where += range(first, first + len(answer))
        trees.append(tree)
    return trees


def _rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which trees stand in which row, none longer than the longest tree: first fit, longest first."""
    room: list[int] = []
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if r == len(rows):
            room.append(max(lengths))
            rows.append([])
        room[r] -= lengths[i]
        rows[r].append(i)
    return rows
