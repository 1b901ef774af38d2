"""Metrics of the front (appendix C of the paper), all on normalised rewards, higher is better."""

from __future__ import annotations

import moocore
import torch
from torch import Tensor
from torchmetrics import Metric


def hypervolume(means: Tensor, reference_point: float) -> Tensor:
    """HV: volume dominated by the mean reward vectors, above ``reference_point`` on every axis.

    Args:
        means: ``(M, K)`` one mean reward vector per preference vector. Rows with NaN, which were not measured, do not
            count; a point that does not exceed the reference point adds nothing.
        reference_point: The same coordinate for every objective.

    Returns:
        A float64 scalar.

    >>> hypervolume(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), reference_point=-1.0)
    tensor(3., dtype=torch.float64)
    """
    points = means[means.isfinite().all(-1)].double().cpu()
    if len(points) == 0:
        return torch.tensor(0.0, dtype=torch.float64)
    reference = [reference_point] * points.shape[1]
    if points.shape[1] == 1:  # moocore starts at two objectives
        return (points.max() - reference_point).clamp(min=0)
    return torch.tensor(float(moocore.hypervolume(points.numpy(), ref=reference, maximise=True)), dtype=torch.float64)


def mean_inner_product(preferences: Tensor, means: Tensor) -> Tensor:
    """MIP: ``(1/N) sum_i w_i . s_i`` over preference vectors that were measured.

    Args:
        preferences: ``(M, K)``.
        means: ``(M, K)`` mean reward vector under each.

    >>> mean_inner_product(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor(2.)
    """
    return (preferences.to(means) * means).sum(-1).nanmean()


def conditional_reward_dispersion(covariances: Tensor) -> Tensor:
    """CRD: ``(1/|W|) sum_w det Cov(s | w)``.

    A determinant is a volume: it can shrink while one axis widens, so it is reported beside the standard deviations.

    Args:
        covariances: ``(M, K, K)`` covariance of the reward vectors of single responses under each preference vector.

    >>> conditional_reward_dispersion(torch.eye(2).expand(3, 2, 2))
    tensor(1.)
    """
    return torch.linalg.det(covariances).nanmean()


def reward_overlap(scores: Tensor, grid_index: Tensor, grid: Tensor, bins: int = 10) -> Tensor:
    """Overlap of the rewards under neighbouring preferences: 1 where w changes nothing, 0 where they are apart.

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
    """Mean reward vectors ``(.., M, K)`` and sample covariances ``(.., M, K, K)``; NaN where responses are too few.

    Args:
        count: ``(.., M)`` responses under each preference vector.
        total: ``(.., M, K)`` sums of their rewards.
        outer: ``(.., M, K, K)`` sums of the outer products of each reward vector with itself.
    """
    n = count.unsqueeze(-1)  # (.., M, 1)
    means = torch.where(n > 0, total / n, torch.nan)
    centred = outer - n.unsqueeze(-1) * means.unsqueeze(-1) * means.unsqueeze(-2)
    return means, torch.where(n.unsqueeze(-1) > 1, centred / (n.unsqueeze(-1) - 1), torch.nan)


class ParetoFrontMetric(Metric):
    """Means and covariances of reward vectors by preference vector; exact under any split into batches or processes.

    Args:
        grid: ``(M, K)`` preference vectors of the evaluation.
        reference_point: Of the hypervolume.
    """

    full_state_update = False
    grid: Tensor
    count: Tensor  # (M,)
    total: Tensor  # (M, K)
    outer: Tensor  # (M, K, K)
    left_out: Tensor  # ()

    def __init__(self, grid: Tensor, reference_point: float) -> None:
        super().__init__()
        m, k = grid.shape
        self.register_buffer("grid", grid, persistent=False)
        self.reference_point = reference_point
        self.add_state("count", torch.zeros(m, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(m, k, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(m, k, k, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("left_out", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, grid_index: Tensor, scores: Tensor) -> None:
        """Adds responses: the index of their preference vector ``(N,)`` and their normalised rewards ``(N, K)``.

        A response that some objective gave no finite score does not count but in ``left_out``.
        """
        keep = scores.isfinite().all(-1)
        index, rows = grid_index[keep].to(self.total.device), scores[keep].double().to(self.total.device)
        self.left_out += (~keep).sum()
        self.count.index_add_(0, index, torch.ones_like(rows[:, 0]))
        self.total.index_add_(0, index, rows)
        self.outer.index_add_(0, index, rows.unsqueeze(-1) * rows.unsqueeze(-2))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean reward vectors ``(M, K)`` and sample covariances ``(M, K, K)``; NaN where responses are too few."""
        return reward_moments(self.count, self.total, self.outer)

    def compute(self) -> dict[str, Tensor]:
        """``hv``, ``mip``, ``crd``, per-axis standard deviations ``sd`` ``(K,)`` and the front ``means`` ``(M, K)``;
        ``left_out`` responses had no score."""
        means, covariances = self.moments()
        variances = covariances.diagonal(dim1=-2, dim2=-1)  # (M, K)
        return {
            "hv": hypervolume(means, self.reference_point),
            "mip": mean_inner_product(self.grid, means),
            "crd": conditional_reward_dispersion(covariances),
            "sd": variances.clamp(min=0).sqrt().nanmean(0),
            "means": means,
            "left_out": self.left_out.clone(),  # the sum goes on in place
        }
