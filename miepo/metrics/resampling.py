"""The front's figures under resampling of prompts and under permutation of preferences: what of them is chance.

The hypervolume of measured means is flattered by noise, since it takes the outermost of them: a policy that ignores
its preference seems to have a front. Two values tell how much of it is real. One permutes the preferences within every
prompt, which is what an evaluation of such a policy would look like. The other takes the bias off the value that
resampling the prompts adds once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor

from miepo.metrics.front import hypervolume, hypervolumes, reward_moments
from miepo.metrics.steerability import t_interval
from miepo.seeding import RandomStream, generator

DRAWS = 1000
PERMUTATIONS = 400


@dataclass(frozen=True)
class AnswerSums:
    """Sums of the rewards of the answers to each of P prompts under each of M preference vectors."""

    count: Tensor  # (P, M)
    total: Tensor  # (P, M, K)
    outer: Tensor  # (P, M, K, K) of the outer product of each reward vector with itself

    @classmethod
    def of(cls, scores: Tensor, grid_index: Tensor, positions: Tensor, m: int) -> AnswerSums:
        """Make one of ``(N, K)`` rewards, ``(N,)`` preference vectors and prompts.

        Rows that are not finite do not count.
        """
        _, prompt = positions.unique(return_inverse=True)  # (N,)
        p, k = int(prompt.max()) + 1 if len(prompt) else 0, scores.shape[1]
        keep = scores.isfinite().all(-1)
        rows, place = scores[keep].double(), (prompt * m + grid_index)[keep]
        products = rows.unsqueeze(-1) * rows.unsqueeze(-2)

        def added(shape: tuple[int, ...], values: Tensor) -> Tensor:
            return torch.zeros(p * m, *shape, dtype=torch.float64, device=rows.device).index_add_(0, place, values)

        return cls(
            added((), torch.ones(len(rows), dtype=torch.float64, device=rows.device)).view(p, m),
            added((k,), rows).view(p, m, k),
            added((k, k), products).view(p, m, k, k),
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean reward vectors ``(M, K)`` and covariances ``(M, K, K)``."""
        return reward_moments(self.count.sum(0), self.total.sum(0), self.outer.sum(0))


@dataclass(frozen=True)
class HypervolumeEstimate:
    """A hypervolume and what of it is chance."""

    value: float  # of the measured means
    above_chance: float  # minus the mean of what permuted preferences give: 0 for a policy that ignores them
    p_value: float  # how often permuted preferences give as much
    corrected: float  # the value minus its bias, as resampling the prompts shows it
    low: float  # of the corrected value's 95 % interval
    high: float


def resampled_moments(sums: AnswerSums, draws: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return means ``(draws, M, K)`` and covariances ``(draws, M, K, K)`` of resamples of the prompts.

    Answers to one prompt stay together. Two evaluations of the same prompts get the same resamples.
    """
    p = len(sums.count)
    chosen = torch.from_numpy(generator(RandomStream.BOOTSTRAP, seed).integers(p, size=(draws, p)))
    times = torch.zeros(draws, p, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(draws, p, dtype=torch.float64)
    )
    parts = (sums.count, sums.total, sums.outer)
    return reward_moments(*(torch.einsum("dp,p...->d...", times.to(part.device), part) for part in parts))


def moments_without_each(sums: AnswerSums) -> tuple[Tensor, Tensor]:
    """Take means ``(P, M, K)`` and covariances ``(P, M, K, K)`` of all prompts but one, for each prompt."""
    return reward_moments(*(part.sum(0) - part for part in (sums.count, sums.total, sums.outer)))


def jackknife_interval(value: Tensor | float, without_each: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the limits of a figure's t interval with the jackknife's standard error (Tukey 1958).

    Args:
        value: ``(..)`` the figure of all P prompts.
        without_each: ``(P, ..)`` the figure of all prompts but one; NaN does not count.
        level: Coverage.

    Returns:
        Two of ``(..)``; NaN where fewer than two values are known.

    >>> low, high = jackknife_interval(torch.tensor(2.0), torch.tensor([2.5, 2.0, 1.5]))  # the mean of 1, 2 and 3
    >>> round(float(low), 2), round(float(high), 2)
    (-0.48, 4.48)
    """
    p = (~without_each.isnan()).sum(0)
    _, low, high = t_interval(p * value - (p - 1) * without_each, level)
    return value - (high - low) / 2, value + (high - low) / 2


def permuted_means(sums: AnswerSums, draws: int = PERMUTATIONS, seed: int = 0) -> Tensor:
    """Return means ``(draws, M, K)`` with the preferences permuted within every prompt, all prompts independently."""
    p, m = sums.count.shape
    order = generator(RandomStream.BOOTSTRAP, seed, 1).random((draws, p, m)).argsort(-1)
    rows, columns = torch.arange(p)[None, :, None], torch.from_numpy(order)
    count, total = sums.count.cpu()[rows, columns].sum(1), sums.total.cpu()[rows, columns].sum(1)
    return torch.where(count.unsqueeze(-1) > 0, total / count.unsqueeze(-1), torch.nan)


def estimate_hypervolume(sums: AnswerSums, reference_point: float, seed: int = 0) -> HypervolumeEstimate:
    """Return the hypervolume of an evaluation and what of it is chance; NaN where fewer than two prompts tell."""
    value = float(hypervolume(sums.moments()[0], reference_point))
    if len(sums.count) < 2:
        return HypervolumeEstimate(value, nan, nan, nan, nan, nan)

    chance = hypervolumes(permuted_means(sums, seed=seed), reference_point)
    drawn = hypervolumes(resampled_moments(sums, seed=seed)[0], reference_point)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return HypervolumeEstimate(
        value,
        value - float(chance.mean()),
        float((1 + (chance >= value - 1e-12).sum()) / (1 + len(chance))),
        2 * value - float(drawn.mean()),
        2 * value - float(high),
        2 * value - float(low),
    )
