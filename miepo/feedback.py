"""From scores to pairwise feedback: +1 the first response is preferred, -1 the second, 0 neither."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Feedback = Literal["per_objective", "scalarised"]


def pairwise_labels(scores: Tensor, empty: Tensor) -> Tensor:
    """Each objective orders the pair by its own score (Algorithm 1, step 3).

    Args:
        scores: ``(B, 2, K)``, higher is better; NaN or infinite where there is no score.
        empty: ``(B, 2)`` True where a response has no text: such a pair carries no feedback.

    Returns:
        ``(B, K)`` float: +1, -1, or 0 for a tie, a score that is not a finite number, or an empty response.
    """
    usable = scores.isfinite().all(1) & ~empty.any(1, keepdim=True)  # (B, K)
    return torch.where(usable, torch.sign(scores[:, 0] - scores[:, 1]), 0.0)


def scalarised_labels(scores: Tensor, routing: Tensor, empty: Tensor) -> Tensor:
    """One order for all objectives, by the scalarised reward ``sum_k w_k R_k`` (arXiv 2503.00295).

    Differs from :func:`pairwise_labels` exactly where objectives conflict. An objective of weight 0 does not take part.

    Args:
        scores: ``(B, 2, K)``.
        routing: ``(B, K)`` weights of the objectives.
        empty: ``(B, 2)``.

    Returns:
        ``(B, K)`` with equal columns.
    """
    weighted = torch.where(routing.unsqueeze(1) > 0, scores * routing.unsqueeze(1), 0.0).sum(-1, keepdim=True)
    return pairwise_labels(weighted, empty).expand(-1, scores.shape[-1])


def feedback_counts(labels: Tensor, scores: Tensor, asked: Tensor, empty: Tensor) -> dict[str, int]:
    """What became of the labels that were asked for, each counted once, and the number of empty responses.

    Args:
        labels: ``(B, K)`` the labels in use.
        scores: ``(B, 2, K)`` the scores they come from.
        asked: ``(B, K)`` True where the objective was asked to score the pair.
        empty: ``(B, 2)``.
    """
    has_empty = empty.any(1, keepdim=True).expand(asked.shape)  # (B, K)
    unscored = ~scores.isfinite().all(1) & ~has_empty
    counted = asked & ~has_empty & ~unscored
    return {
        "empty_responses": int(empty.sum()),
        "empty": int((asked & has_empty).sum()),
        "not_a_number": int((asked & unscored).sum()),
        "ties": int((counted & (labels == 0)).sum()),
        "labels": int((counted & (labels != 0)).sum()),
    }
