"""The figures of the front as a metric of one evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from miepo.metrics.answers import AnswerMetric
from miepo.metrics.front import front_figures, mip_parts
from miepo.metrics.resampling import AnswerSums, estimate_hypervolume


class ParetoFrontMetric(AnswerMetric):
    """HV, MIP and CRD, what of the hypervolume is chance, means and standard deviations by preference vector.

    Args:
        grid: ``(M, K)`` preference vectors of the evaluation.
        reference_point: Of the hypervolume.
    """

    def __init__(self, grid: Tensor, reference_point: float) -> None:
        super().__init__(grid)
        self.reference_point = reference_point

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean reward vectors ``(M, K)`` and sample covariances ``(M, K, K)``; NaN where answers are too few."""
        return AnswerSums.of(*self.answers(), len(self.grid)).moments()

    def compute(self) -> dict[str, Tensor]:
        """Return ``hv``, ``mip``, ``crd``, ``sd`` ``(K,)`` by axis, the front ``means`` ``(M, K)``.

        The number ``left_out``.

        Of the hypervolume also ``hv_above_chance`` with ``hv_p``, and ``hv_corrected`` with ``hv_corrected_low`` and
        ``.._high`` (:class:`~miepo.metrics.resampling.HypervolumeEstimate`); of MIP its parts ``mip_level`` and
        ``mip_covariance``.
        """
        scores, grid_index, positions = self.answers()
        sums = AnswerSums.of(scores, grid_index, positions, len(self.grid))
        means, covariances = sums.moments()
        hv, mip, crd = front_figures(means, covariances, self.grid, self.reference_point)
        estimate = estimate_hypervolume(sums, self.reference_point)
        level, covariance = mip_parts(self.grid, means)
        found = {
            "hv": hv,
            "hv_above_chance": estimate.above_chance,
            "hv_p": estimate.p_value,
            "hv_corrected": estimate.corrected,
            "hv_corrected_low": estimate.low,
            "hv_corrected_high": estimate.high,
            "mip": mip,
            "mip_level": float(level),
            "mip_covariance": float(covariance),
            "crd": crd,
            "left_out": float(len(scores) - sums.count.sum()),
        }
        variances = covariances.diagonal(dim1=-2, dim2=-1)  # (M, K)
        figures = {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}
        return figures | {"sd": variances.clamp(min=0).sqrt().nanmean(0), "means": means}
