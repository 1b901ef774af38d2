"""Whether the policy obeys: how far each mean reward moves with its own weight, and with the weights of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from miepo.metrics.answers import AnswerMetric


def preference_slopes(scores: Tensor, grid_index: Tensor, positions: Tensor, grid: Tensor) -> Tensor:
    """Return the least-squares slope of every reward along every weight, prompt by prompt.

    A slope is in reward units (standard deviations of a normalised reward) from weight 0 to weight 1. The other weights
    share what is left, as they do on the grid.

    Args:
        scores: ``(N, K)`` normalised rewards; what is not finite does not count.
        grid_index: ``(N,)`` the preference vector of each response.
        positions: ``(N,)`` the prompt of each response.
        grid: ``(M, K)``.

    Returns:
        ``(P, K, K)`` float64: of prompt p, ``[p, j, k]`` is the slope of reward j along weight k; NaN where a prompt
        has no finite rewards under two different weights.

    >>> grid = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    >>> preference_slopes(2 * grid, torch.arange(3), torch.zeros(3), grid)
    tensor([[[ 2., -2.],
             [-2.,  2.]]], dtype=torch.float64)
    """
    _, prompt = positions.unique(return_inverse=True)  # (N,)
    count, k = int(prompt.max()) + 1 if len(prompt) else 0, grid.shape[1]
    finite = scores.isfinite()
    y = torch.where(finite, scores, 0.0).double()  # (N, K)
    x, used = grid.double()[grid_index], finite.double()  # (N, K) weights, (N, K)

    def total(values: Tensor) -> Tensor:
        """Sum over the responses of each prompt, ``(N, K, K) -> (P, K, K)``."""
        return torch.zeros(count, k, k, dtype=torch.float64, device=values.device).index_add_(0, prompt, values)

    used, y, x = used.unsqueeze(2), y.unsqueeze(2), x.unsqueeze(1)  # (N, K, 1), (N, K, 1), (N, 1, K)
    n = total(used.expand(-1, -1, k))
    mean_x = total(used * x) / n  # NaN where there is nothing
    centred = used * (x - mean_x[prompt])  # (N, K, K)
    spread = total(centred * (x - mean_x[prompt]))
    return torch.where(spread > 1e-12, total(centred * y) / spread, torch.nan)


def t_interval(values: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean over the first dimension and the limits of its t interval, ``(P, ..) -> (..)`` each.

    NaN does not count.

    With fewer than two values there are no limits: NaN.
    """
    numbers = values.double()
    n = (~numbers.isnan()).sum(0)
    mean = numbers.nanmean(0)
    deviation = (torch.where(numbers.isnan(), 0.0, numbers - mean).square().sum(0) / (n - 1)).sqrt()
    quantile = torch.from_numpy(np.asarray(stats.t.ppf((1 + level) / 2, np.maximum(n.cpu().numpy() - 1, 1))))
    half = torch.where(n > 1, quantile.to(mean.device) * deviation / n.sqrt(), torch.nan)
    return mean, mean - half, mean + half


def interval_figures(key: str, interval: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return an estimate with its limits by the names they are logged under: ``key``, ``key_low``, ``key_high``."""
    return {f"{key}{end}": figure for end, figure in zip(("", "_low", "_high"), interval, strict=True)}


def without_limits(keys: Sequence[str]) -> list[str]:
    """Leave out the ends of intervals, as :func:`interval_figures` names them, of figures that are among ``keys``."""
    limits = {f"{key}_{end}" for key in keys for end in ("low", "high")}
    return [key for key in keys if key not in limits]


def rank_correlation(means: Tensor, grid: Tensor) -> Tensor:
    """Return Spearman's correlation of each weight and its mean reward over the grid, ``(M, K), (M, K) -> (K,)``.

    1 where the mean reward rises with its weight from vector to vector. NaN where the rewards, or the weights, are all
    alike.
    """
    found = []
    for k in range(grid.shape[1]):
        keep = means[:, k].isfinite()
        weights, rewards = grid[keep, k].cpu().numpy(), means[keep, k].cpu().numpy()
        alike = len(weights) < 2 or np.ptp(weights) == 0 or np.ptp(rewards) == 0
        found.append(float("nan") if alike else float(stats.spearmanr(weights, rewards).statistic))
    return torch.tensor(found, dtype=torch.float64)


class SteerabilityMetric(AnswerMetric):
    """Slopes of mean normalised rewards along weights, with t intervals over prompts."""

    def compute(self) -> dict[str, Tensor]:
        """Return ``slope``, ``low`` and ``high`` ``(K, K)`` (row: reward, column: weight), ``rank`` ``(K,)``.

        See above.
        """
        scores, grid_index, positions = self.answers()
        slope, low, high = t_interval(preference_slopes(scores, grid_index, positions, self.grid))
        means = torch.stack([scores[grid_index == i].nanmean(0) for i in range(len(self.grid))])
        return {"slope": slope, "low": low, "high": high, "rank": rank_correlation(means, self.grid)}


def follows(name: str, slope: float, low: float, high: float) -> str:
    """Return whether an objective follows its weight, in words.

    >>> follows("brevity", 1.9, 1.4, 2.4)
    'brevity follows its weight: +1.9 sd [+1.4, +2.4]'
    >>> follows("relevance", 0.1, -0.3, 0.5)
    'relevance: no evidence that it follows its weight: +0.1 sd [-0.3, +0.5]'
    """
    if np.isnan(slope):
        return f"{name}: its slope is not known: there are no rewards under two different weights"
    size = f"{slope:+.1f} sd"
    if np.isnan(low) or np.isnan(high):
        return f"{name}: no evidence that it follows its weight: {size}, without an interval"
    size += f" [{low:+.1f}, {high:+.1f}]"
    if low > 0:
        return f"{name} follows its weight: {size}"
    if high < 0:
        return f"{name} goes against its weight: {size}"
    return f"{name}: no evidence that it follows its weight: {size}"
