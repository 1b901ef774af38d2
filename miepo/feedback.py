"""From scores to pairwise feedback: which responses are compared, and which of two is preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Feedback = Literal["per_objective", "scalarised"]


@dataclass(frozen=True)
class PairwiseFeedback:
    """Which of ``n`` responses are compared, and how each objective orders them."""

    pairs: Tensor  # (B, Q, 2)
    labels: Tensor  # (B, K) each objective on its pair
    cross_labels: Tensor  # (B, Q, K) every objective on every pair
    counterfactual_labels: Tensor  # (B, C, K) as labels, under each w-
    compared: Tensor  # (B, n) bool


def pairwise_labels(scores: Tensor, empty: Tensor) -> Tensor:
    """Let each objective order the pair by its own score (Algorithm 1, step 3).

    Args:
        scores: ``(B, 2, K)``, higher is better; NaN or infinite where there is no score.
        empty: ``(B, 2)`` True where a response has no text: such a pair carries no feedback.

    Returns:
        ``(B, K)`` float: +1, -1, or 0 for a tie, a score that is not a finite number, or an empty response.
    """
    usable = scores.isfinite().all(1) & ~empty.any(1, keepdim=True)  # (B, K)
    return torch.where(usable, torch.sign(scores[:, 0] - scores[:, 1]), 0.0)


def scalarised_rewards(scores: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_k w_k R_k`` of each response, ``(B, n, K), (B, K) -> (B, n)``.

    An objective of weight 0 takes no part.
    """
    return torch.where(weights.unsqueeze(1) > 0, scores * weights.unsqueeze(1), 0.0).sum(-1)


def scalarised_labels(scores: Tensor, routing: Tensor, empty: Tensor) -> Tensor:
    """Order pairs for all objectives alike, by the scalarised reward ``sum_k w_k R_k`` (arXiv 2503.00295).

    Differs from :func:`pairwise_labels` exactly where objectives conflict. An objective of weight 0 does not take part.

    Args:
        scores: ``(B, 2, K)``.
        routing: ``(B, K)`` weights of the objectives.
        empty: ``(B, 2)``.

    Returns:
        ``(B, K)`` with equal columns.
    """
    weighted = scalarised_rewards(scores, routing).unsqueeze(-1)  # (B, 2, 1)
    return pairwise_labels(weighted, empty).expand(-1, scores.shape[-1])


def extremes(values: Tensor, usable: Tensor) -> Tensor:
    """Return the responses of the highest and the lowest value, by index and in the order of their indices, ``(B, 2)``.

    Of two responses both, whatever their values. Of more, where fewer than two are usable, one of them twice: a pair
    that says nothing.

    Args:
        values: ``(B, n)``.
        usable: ``(B, n)`` bool.
    """
    if values.shape[1] == 2:
        return torch.arange(2, device=values.device).expand(len(values), 2)
    highest = torch.where(usable, values, -torch.inf).argmax(1)  # of equal values the first
    lowest = torch.where(usable, values, torch.inf).argmin(1)
    lowest = torch.where(usable.any(1), lowest, highest)
    return torch.stack([highest, lowest], 1).sort(1).values


def of_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """Return what the responses of each pair have: ``(B, n, ..), (B, Q, 2) -> (B, Q, 2, ..)``."""
    rows = torch.arange(len(values), device=values.device)[:, None, None]
    return values[rows, pairs]


def pairwise_feedback(
    scores: Tensor, empty: Tensor, routing: Tensor, counterfactual: Tensor, feedback: Feedback
) -> PairwiseFeedback:
    """Compare responses: two with each other; of more, the best and the worst.

    ``per_objective`` compares, for each objective, the best and the worst by its own score; ``scalarised`` those by the
    scalarised reward under w+. The same pairs are ordered under w-.

    Args:
        scores: ``(B, n, K)``, higher is better.
        empty: ``(B, n)`` True where a response has no text.
        routing: ``(B, K)`` weights of the objectives.
        counterfactual: ``(B, C, K)`` w-.
        feedback: Which scores order a pair.
    """
    count, k = scores.shape[1:]
    if feedback == "scalarised":
        values = scalarised_rewards(scores, routing).unsqueeze(-1)  # (B, n, 1)
    else:
        values = scores if count > 2 else scores[..., :1]  # two responses are one pair, which all objectives judge
    usable = values.isfinite() & ~empty.unsqueeze(-1)  # (B, n, Q)
    pairs = torch.stack([extremes(v, u) for v, u in zip(values.unbind(-1), usable.unbind(-1), strict=True)], 1)
    scored, silent = of_pairs(scores, pairs), of_pairs(empty, pairs)  # (B, Q, 2, K), (B, Q, 2)

    def labels_under(weights: Tensor) -> Tensor:
        """Return ``(B, Q, K)``."""
        if feedback == "scalarised":
            return scalarised_labels(scored[:, 0], weights, silent[:, 0]).unsqueeze(1)
        labels = [pairwise_labels(s, e) for s, e in zip(scored.unbind(1), silent.unbind(1), strict=True)]
        return torch.stack(labels, 1)

    cross = labels_under(routing)
    under = [own_pair(labels_under(w)) for w in counterfactual.unbind(1)]  # C of (B, K)
    compared = torch.ones_like(empty)
    if count > 2:
        told = own_pair(cross) != 0  # (B, K)
        hits = torch.nn.functional.one_hot(pairs, count).any(2)  # (B, Q, n)
        compared = (hits & told.unsqueeze(-1)).any(1)  # where Q is 1, it is if any objective told
    return PairwiseFeedback(
        pairs,
        own_pair(cross),
        cross,
        torch.stack(under, 1) if under else cross.new_empty(len(cross), 0, k),
        compared,
    )


def own_pair(values: Tensor) -> Tensor:
    """Return what each objective has on its own pair: ``(B, Q, K) -> (B, K)``, where Q is 1 or K."""
    return values[:, 0] if values.shape[1] == 1 else values.diagonal(dim1=1, dim2=2)


def feedback_counts(labels: Tensor, scores: Tensor, asked: Tensor, empty: Tensor) -> dict[str, int]:
    """Return what became of the labels that were asked for, each counted once, and the number of empty responses.

    Args:
        labels: ``(B, K)`` the labels in use.
        scores: ``(B, n, K)`` the scores they come from.
        asked: ``(B, K)`` True where the objective was asked to score the responses.
        empty: ``(B, n)``.
    """
    silent = ((~empty).sum(1, keepdim=True) < 2).expand(asked.shape)  # (B, K) too few responses have text
    unscored = ((scores.isfinite() & ~empty.unsqueeze(-1)).sum(1) < 2) & ~silent
    counted = asked & ~silent & ~unscored
    return {
        "empty_responses": int(empty.sum()),
        "empty": int((asked & silent).sum()),
        "not_a_number": int((asked & unscored).sum()),
        "ties": int((counted & (labels == 0)).sum()),
        "labels": int((counted & (labels != 0)).sum()),
    }
