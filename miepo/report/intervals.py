"""HV, MIP and CRD of an evaluation from its answers, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from miepo.metrics import conditional_reward_dispersion, hypervolume, mean_inner_product, reward_overlap
from miepo.metrics.front import reward_moments
from miepo.preferences import Stream, generator
from miepo.report.runs import Evaluation

KEYS = ("front/hv", "front/mip", "front/crd")


def front_figures(
    means: Tensor, covariances: Tensor, grid: Tensor, reference_point: float
) -> tuple[float, float, float]:
    """HV, MIP and CRD of mean reward vectors ``(M, K)`` and covariances ``(M, K, K)``."""
    return (
        float(hypervolume(means, reference_point)),
        float(mean_inner_product(grid, means)),
        float(conditional_reward_dispersion(covariances)),
    )


def sums_by_prompt(evaluation: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """For each prompt counts ``(P, M)``, sums ``(P, M, K)`` and sums of outer products ``(P, M, K, K)`` of rewards."""
    _, prompt = evaluation.positions.unique(return_inverse=True)  # (N,)
    p, (m, k) = int(prompt.max()) + 1, evaluation.grid.shape
    keep = evaluation.scores.isfinite().all(-1)
    rows, place = evaluation.scores[keep], (prompt * m + evaluation.grid_index)[keep]
    count = torch.zeros(p * m, dtype=torch.float64).index_add_(0, place, torch.ones(len(rows), dtype=torch.float64))
    total = torch.zeros(p * m, k, dtype=torch.float64).index_add_(0, place, rows)
    products = rows.unsqueeze(-1) * rows.unsqueeze(-2)
    outer = torch.zeros(p * m, k, k, dtype=torch.float64).index_add_(0, place, products)
    return count.view(p, m), total.view(p, m, k), outer.view(p, m, k, k)


def point_estimates(evaluation: Evaluation, reference_point: float) -> dict[str, float]:
    """HV, MIP and CRD by their logged names."""
    count, total, outer = sums_by_prompt(evaluation)
    means, covariances = reward_moments(count.sum(0), total.sum(0), outer.sum(0))
    return dict(zip(KEYS, front_figures(means, covariances, evaluation.grid, reference_point), strict=True))


def bootstrap(evaluation: Evaluation, reference_point: float, seed: int = 0, draws: int = 1000) -> np.ndarray:
    """HV, MIP and CRD of resamples of the prompts, ``(draws, 3)``.

    Answers to one prompt stay together. Two evaluations of the same prompts get the same resamples, so that the
    difference of their values is that of pairs.

    A resample repeats prompts and so has less spread than the prompts themselves, and a determinant even less: the
    values of CRD are scaled to have the estimate as their mean.
    """
    parts = sums_by_prompt(evaluation)
    p = len(parts[0])
    chosen = generator(Stream.BOOTSTRAP, seed).integers(p, size=(draws, p))
    times = torch.zeros(draws, p, dtype=torch.float64).scatter_add_(
        1, torch.from_numpy(chosen), torch.ones(draws, p, dtype=torch.float64)
    )
    count, total, outer = (torch.einsum("dp,p...->d...", times, part) for part in parts)
    moments = zip(*reward_moments(count, total, outer), strict=True)
    drawn = np.array([front_figures(*pair, evaluation.grid, reference_point) for pair in moments])
    estimate, dispersion = point_estimates(evaluation, reference_point)["front/crd"], drawn[:, 2]
    if estimate > 0 and np.nansum(dispersion) > 0:
        drawn[:, 2] *= estimate / np.nanmean(dispersion)
    return drawn


def with_interval(values: Mapping[str, float], drawn: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Figures and the limits of their percentile intervals, ``.._low`` and ``.._high``; what is NaN is left out."""
    found: dict[str, float] = {}
    for key, column in zip(KEYS, drawn.T, strict=True):
        if np.isfinite(values[key]):
            low, high = np.nanquantile(column, [(1 - level) / 2, (1 + level) / 2])
            found |= {key: values[key], f"{key}_low": float(low), f"{key}_high": float(high)}
    return found


def overlap(evaluation: Evaluation) -> float:
    """Of the rewards under neighbouring preferences; NaN where it cannot be told."""
    if len(evaluation.grid) < 2 or not evaluation.scores.isfinite().all(-1).any():
        return float("nan")
    return float(reward_overlap(evaluation.scores, evaluation.grid_index, evaluation.grid))


def same_prompts(one: Evaluation, other: Evaluation) -> bool:
    return one.positions.unique().equal(other.positions.unique()) and one.grid.equal(other.grid)
