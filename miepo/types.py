"""The records that travel along the arrows of the flow, and the shape alphabet used throughout.

=====  ==========================================================================
``B``  prompts in a batch
``n``  responses per prompt (2 in the paper)
``Q``  pairs of responses per prompt: 1 that every objective judges, or K, one for each objective
``N``  sequences in a flat batch (``n B`` for a rollout, ``B M`` for an evaluation)
``K``  objectives; column ``k`` of every ``(.., K)`` tensor is objective ``k``
``P``  prompt tokens, padded on the left
``T``  response tokens, padded on the right
``C``  counterfactual preference vectors w- per prompt
``M``  preference vectors of an evaluation grid
``R``  middle dimension of a LoRA layer
``V``  vocabulary
=====  ==========================================================================

Masks are boolean and True where a token counts. Preference vectors lie on the simplex.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from miepo.policy.trunk import Trunk


@dataclass(frozen=True)
class Tokens:
    """Token ids with their mask, both ``(.., L)``."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"] = "right", width: int = 0
    ) -> Tokens:
        """Pad rows of token ids on one side, to the longest or to ``width``: ``(N, L)``."""
        longest = max([width, *map(len, rows)])
        tensors = [torch.tensor(row, dtype=torch.long) for row in [*rows, [pad] * longest]]  # the last sets the length
        ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)[:-1]
        place = torch.arange(longest).expand(len(rows), -1)
        lengths = torch.tensor([[len(row)] for row in rows])
        return cls(ids, place < lengths if side == "right" else place >= longest - lengths)

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))

    def repeat(self, times: int) -> Tokens:
        """Repeat each row ``times`` times in succession: ``(N, L) -> (N * times, L)``."""
        return Tokens(self.ids.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.mask[rows])

    def flat(self) -> Tokens:
        """Join all leading dimensions into one: ``(B, n, T) -> (n B, T)``."""
        return Tokens(self.ids.flatten(0, -2), self.mask.flatten(0, -2))


@dataclass(frozen=True)
class PromptBatch:
    """What the DataLoader yields: prompts and where they stand in the run.

    ``epochs`` and ``positions`` (index of the prompt in its epoch) seed every random draw made for a prompt, so that
    draws do not depend on batch size, accumulation or the number of processes. ``grid_index`` and ``preference`` are
    given for evaluation and prediction, where the preference vector is not drawn.
    """

    prompts: Sequence[str]
    epochs: Sequence[int]
    positions: Sequence[int]
    grid_index: Tensor | None = None  # (B,)
    preference: Tensor | None = None  # (B, K)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Responses:
    """Sampled responses: ``tokens`` are ``(B, n, T)``; the end token belongs to the response and counts."""

    tokens: Tokens
    texts: Sequence[Sequence[str]]  # B x n, decoded without control tokens
    finished: Tensor  # (B, n) bool: ended by itself rather than at the token limit
    log_prob: Tensor | None = None  # (B, n, T) by the engine, where it is not the model that trains
    counts: dict[str, int] = field(default_factory=dict)  # by the engine, of the whole batch

    def __getitem__(self, rows: slice) -> Responses:
        log_prob = None if self.log_prob is None else self.log_prob[rows]
        return Responses(self.tokens[rows], self.texts[rows], self.finished[rows], log_prob, self.counts)

    def to(self, device: torch.device | str) -> Responses:
        log_prob = None if self.log_prob is None else self.log_prob.to(device)
        return replace(self, tokens=self.tokens.to(device), finished=self.finished.to(device), log_prob=log_prob)

    @property
    def empty(self) -> Tensor:
        """Where a response has no visible text, ``(B, n)`` bool."""
        rows = [[not text.strip() for text in row] for row in self.texts]
        return torch.tensor(rows, device=self.tokens.ids.device)


def read_under(compared: Tensor, anchors: Tensor, counterfactuals: int) -> Tensor:
    """Say under what responses are read: compared ones under w+, anchors under each w-.

    ``(B, n), (B, n) -> (B, n, 1 + C)`` bool.
    """
    return torch.cat([compared.unsqueeze(-1), anchors.unsqueeze(-1).expand(-1, -1, counterfactuals)], -1)


@dataclass(frozen=True)
class PreferenceBatch:
    """One online rollout with its pairwise feedback: everything ``training_step`` needs."""

    prompts: Sequence[str]
    preference: Tensor  # (B, K) w+, the vector the responses were sampled under
    counterfactual: Tensor  # (B, C, K) w-, C = 0 where the exploration term is off
    compared: Tensor  # (B, n) bool: the responses that occur in a pair; of the others no log-probability is taken
    anchors: Tensor  # (B, n) bool: those of them that are read under w-, too
    routing: Tensor  # (B, K) weights of the objectives, from the router
    responses: Responses  # (B, n, T)
    scores: Tensor  # (B, n, K) normalised, higher is better; NaN where not asked or not a number
    pairs: Tensor  # (B, Q, 2) which responses are compared, by index
    labels: Tensor  # (B, K) each objective on its pair: +1 prefers the first response, -1 the second, 0 neither
    counterfactual_labels: Tensor  # (B, C, K) the same feedback as it would be under each w-
    cross_labels: Tensor  # (B, Q, K) every objective on every pair
    reference_log_prob: Tensor  # (B, n, T) under w+, adapter off; 0 where not compared
    counterfactual_reference_log_prob: Tensor  # (B, n, C, T) of the anchors under w-, adapter off
    trunk: Trunk | None = None  # states below the adapter, which the reference and the policy have in common
    staleness: int | None = None  # optimiser steps since the responses were begun; None if sampled in this process
    max_gap: float = inf  # from the engine's log-probabilities, in nats a token, beyond which something is wrong
    counts: dict[str, int] = field(default_factory=dict)  # ties, nan scores, empty responses
    seconds: dict[str, float] = field(default_factory=dict)  # sampling, scoring, reference

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def preferences(self) -> Tensor:
        """The preference vectors under which responses are read: w+ and every w-, ``(B, 1 + C, K)``."""
        return torch.cat([self.preference.unsqueeze(1), self.counterfactual], 1)

    @property
    def read_under(self) -> Tensor:
        """Which responses are read under which of w+ and ``C`` w-, ``(B, n, 1 + C)`` bool."""
        return read_under(self.compared, self.anchors, self.counterfactual.shape[1])

    def __getitem__(self, prompts: slice) -> PreferenceBatch:
        """Return some of the prompts, with all that belongs to them; counts and seconds are of the whole."""
        kept = {"counts", "seconds", "staleness", "max_gap"} | ({"trunk"} if self.trunk is None else set())
        return replace(self, **{f.name: getattr(self, f.name)[prompts] for f in fields(self) if f.name not in kept})


@dataclass(frozen=True)
class SupervisedBatch:
    """Responses to imitate, each under the scores it was given: everything a rewards-in-context step needs."""

    prompts: Sequence[str]  # N
    responses: Tokens  # (N, T)
    scores: Tensor  # (N, K) normalised, higher is better
    tokens: float | None = None  # of responses in a process's batch of this step, on average; this one's own if None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class EvaluationBatch:
    """One response per (prompt, grid vector) pair, scored by every objective."""

    prompts: Sequence[str]
    positions: Sequence[int]  # which prompt of the evaluation set, the unit of intervals
    grid_index: Tensor  # (N,)
    preference: Tensor  # (N, K)
    responses: Responses  # (N, 1, T)
    scores: Tensor | None  # (N, K) normalised, higher is better; None for predictions, which are not scored

    def __len__(self) -> int:
        return len(self.prompts)
