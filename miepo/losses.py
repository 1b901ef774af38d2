"""The losses of MI-EPO (arXiv 2607.01392): pure functions of log-probabilities and labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def implicit_reward(log_prob: Tensor, reference_log_prob: Tensor, response_mask: Tensor) -> Tensor:
    """Return ``r(x, w, y) = log pi_theta(y | x, w) - log pi_ref(y | x, w)``, summed over the tokens that count.

    Args:
        log_prob: ``(.., T)`` token log-probabilities of the policy.
        reference_log_prob: ``(.., T)`` the same under the reference.
        response_mask: ``(.., T)`` True where a response token counts.

    Returns:
        ``(..)`` in nats.
    """
    return torch.where(response_mask, log_prob - reference_log_prob, 0.0).sum(-1)


def mean_distance(log_prob: Tensor, other: Tensor, response_mask: Tensor) -> Tensor:
    """Return the mean distance of two engines' log-probabilities of the same tokens.

    ``(.., T) -> (..)`` in nats per token.
    """
    return torch.where(response_mask, (log_prob - other).abs(), 0.0).sum(-1) / response_mask.sum(-1).clamp(min=1)


def alignment_loss(reward: Tensor, labels: Tensor, beta_c: float) -> Tensor:
    """Return Eq. 8: for each objective a DPO loss on the pair as that objective orders it.

    A label of 0 (tie, not a number, empty response) gives ``log 2``, the value of knowing nothing, and no gradient.

    Args:
        reward: ``(B, 2)`` implicit rewards of the two responses under w+, or ``(B, Q, 2)`` of each objective's pair.
        labels: ``(B, K)`` +1 where objective k prefers the first response, -1 the second, 0 neither.
        beta_c: Scale of the alignment logits.

    Returns:
        ``(B, K)``.
    """
    margin = reward[..., 0] - reward[..., 1]  # (B,) or (B, Q)
    margin = (margin if margin.dim() == 2 else margin.unsqueeze(-1)).expand(labels.shape)  # (B, K)
    # where, not a product: 0 * inf would turn an unlabelled pair into NaN
    logit = torch.where(labels == 0, 0.0, beta_c * margin * labels)
    return -F.logsigmoid(logit)


def total_loss(alignment: Tensor, exploration: Tensor | None) -> Tensor:
    """Return Eq. 13, averaged over prompts: ``sum_k w_k L_YC,k`` plus the exploration term.

    Args:
        alignment: ``(B,)`` the routed alignment loss of each prompt.
        exploration: ``(B,)`` the exploration term of each prompt; None where it is off, which is MO-ODPO.

    Returns:
        A scalar.
    """
    return alignment.mean() if exploration is None else (alignment + exploration).mean()


def supervised_loss(log_prob: Tensor, response_mask: Tensor, tokens: float | None = None) -> Tensor:
    """Return the negative log-likelihood of given responses, in nats per response token.

    Args:
        log_prob: ``(N, T)`` token log-probabilities.
        response_mask: ``(N, T)`` True where a response token counts.
        tokens: What the sum is divided by; by default the number of tokens that count.

    Returns:
        A scalar.
    """
    return -torch.where(response_mask, log_prob, 0.0).sum() / (response_mask.sum() if tokens is None else tokens)
