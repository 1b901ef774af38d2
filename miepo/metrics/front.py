"""Metrics of the front (appendix C of the paper), all on normalised rewards, higher is better."""

from __future__ import annotations

import moocore
import numpy as np
import torch
from torch import Tensor


def hypervolume(means: Tensor, reference_point: float) -> Tensor:
    """Return HV: volume dominated by the mean reward vectors, above ``reference_point`` on every axis.

    Args:
        means: ``(M, K)`` one mean reward vector per preference vector. Rows with NaN, which were not measured, do not
            count; a point that does not exceed the reference point adds nothing.
        reference_point: The same coordinate for every objective.

    Returns:
        A float64 scalar.

    >>> hypervolume(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), reference_point=-1.0)
    tensor(3., dtype=torch.float64)
    """
    return torch.tensor(float(hypervolumes(means.unsqueeze(0), reference_point)[0]), dtype=torch.float64)


def hypervolumes(means: Tensor, reference_point: float) -> np.ndarray:
    """Return :func:`hypervolume` of each of many sets of mean reward vectors, ``(S, M, K) -> (S,)`` float64."""
    sets = means.double().cpu().numpy()
    measured = np.isfinite(sets).all(-1)  # (S, M)
    if sets.shape[-1] == 1:  # moocore starts at two objectives
        highest = np.where(measured, sets[..., 0], -np.inf).max(-1, initial=-np.inf)
        return np.maximum(highest - reference_point, 0.0)
    indicator = moocore.Hypervolume(ref=[reference_point] * sets.shape[-1], maximise=True)
    return np.array([float(indicator(s[keep])) if keep.any() else 0.0 for s, keep in zip(sets, measured, strict=True)])


def mean_inner_product(preferences: Tensor, means: Tensor) -> Tensor:
    """Return MIP: ``(1/N) sum_i w_i . s_i`` over preference vectors that were measured.

    Args:
        preferences: ``(M, K)``.
        means: ``(.., M, K)`` mean reward vector under each.

    Returns:
        ``(..)``.

    >>> mean_inner_product(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor(2.)
    """
    return (preferences.to(means) * means).sum(-1).nanmean(-1)


def mip_parts(preferences: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return what MIP is made of: ``mean(w) . mean(s)`` and ``sum_k Cov(w_k, s_k)``, over vectors that were measured.

    The first tells where the normalisation lies; only the second tells that the rewards follow the preferences.

    Args:
        preferences: ``(M, K)``.
        means: ``(M, K)`` mean reward vector under each.

    >>> mip_parts(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    (tensor(1.), tensor(1.))
    """
    keep = means.isfinite().all(-1)
    weights, rewards = preferences[keep].to(means), means[keep]
    level = (weights.mean(0) * rewards.mean(0)).sum()
    return level, mean_inner_product(weights, rewards) - level


def conditional_reward_dispersion(covariances: Tensor) -> Tensor:
    """Return CRD: ``(1/|W|) sum_w det Cov(s | w)``.

    A determinant is a volume: it can shrink while one axis widens, so it is reported beside the standard deviations.

    Args:
        covariances: ``(.., M, K, K)`` covariance of the reward vectors of single responses under each preference.

    Returns:
        ``(..)``.

    >>> conditional_reward_dispersion(torch.eye(2).expand(3, 2, 2))
    tensor(1.)
    """
    return torch.linalg.det(covariances).nanmean(-1)


def front_figures(
    means: Tensor, covariances: Tensor, grid: Tensor, reference_point: float
) -> tuple[float, float, float]:
    """Return HV, MIP and CRD of mean reward vectors ``(M, K)`` and covariances ``(M, K, K)``."""
    return (
        float(hypervolume(means, reference_point)),
        float(mean_inner_product(grid, means)),
        float(conditional_reward_dispersion(covariances)),
    )


def reward_overlap(scores: Tensor, grid_index: Tensor, grid: Tensor, bins: int = 10) -> Tensor:
    """Return the overlap of the rewards under neighbouring preferences.

    1 where w changes nothing, 0 where they are apart.

    For every grid vector, its nearest other vector and each objective: the common mass ``sum_b min(p_b, q_b)`` of the
    two histograms over the range of these scores; the mean of all.

    Args:
        scores: ``(N, K)`` rewards; rows that are not finite do not count.
        grid_index: ``(N,)`` the preference vector of each.
        grid: ``(M, K)``.
        bins: Of the histograms. With few responses per vector the histograms' noise lowers the overlap.

    Returns:
        A scalar; NaN where a vector has no responses.
    """
    m, k = grid.shape
    keep = scores.isfinite().all(-1)
    rows, index = scores[keep].double(), grid_index[keep]
    low, high = rows.amin(0), rows.amax(0)  # (K,)
    place = ((rows - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(0, bins - 1)  # (N, K)
    mass = torch.zeros(k, m * bins, dtype=torch.float64, device=rows.device)
    mass.scatter_add_(1, (index.unsqueeze(1) * bins + place).T, torch.ones_like(rows).T)
    share = mass.view(k, m, bins) / mass.view(k, m, bins).sum(-1, keepdim=True)  # (K, M, bins)
    nearest = (torch.cdist(grid, grid) + torch.eye(m, device=grid.device) * 1e9).argmin(-1)  # (M,)
    return torch.minimum(share, share[:, nearest]).sum(-1).mean()


def reward_moments(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean reward vectors ``(.., M, K)`` and sample covariances ``(.., M, K, K)``.

    NaN where responses are too few.

    Args:
        count: ``(.., M)`` responses under each preference vector.
        total: ``(.., M, K)`` sums of their rewards.
        outer: ``(.., M, K, K)`` sums of the outer products of each reward vector with itself.
    """
    n = count.unsqueeze(-1)  # (.., M, 1)
    means = torch.where(n > 0, total / n, torch.nan)
    centred = outer - n.unsqueeze(-1) * means.unsqueeze(-1) * means.unsqueeze(-2)
    return means, torch.where(n.unsqueeze(-1) > 1, centred / (n.unsqueeze(-1) - 1), torch.nan)
