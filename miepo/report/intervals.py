"""Slopes, HV, MIP and CRD of an evaluation from its answers, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miepo.metrics import estimate_hypervolume, mip_parts, preference_slopes, reward_overlap, t_interval
from miepo.metrics.front import front_figures
from miepo.metrics.resampling import DRAWS, AnswerSums, resampled_moments
from miepo.report.runs import Evaluation

KEYS = ("front/hv", "front/mip", "front/crd")


def sums_of(evaluation: Evaluation) -> AnswerSums:
    return AnswerSums.of(evaluation.scores, evaluation.grid_index, evaluation.positions, len(evaluation.grid))


def point_estimates(evaluation: Evaluation, reference_point: float) -> dict[str, float]:
    """HV, MIP and CRD by their logged names."""
    moments = sums_of(evaluation).moments()
    return dict(zip(KEYS, front_figures(*moments, evaluation.grid, reference_point), strict=True))


def chance_of(evaluation: Evaluation, reference_point: float) -> dict[str, float]:
    """What of HV is above chance, and of MIP follows the preference, by their logged names; what is NaN is left out."""
    sums = sums_of(evaluation)
    estimate = estimate_hypervolume(sums, reference_point)
    level, covariance = mip_parts(evaluation.grid, sums.moments()[0])
    found = {"front/hv_above_chance": estimate.above_chance, "front/hv_p": estimate.p_value}
    found |= {"front/mip_level": float(level), "front/mip_covariance": float(covariance)}
    return {key: value for key, value in found.items() if np.isfinite(value)}


def slopes_of(evaluation: Evaluation, before: Evaluation | None = None) -> dict[str, float]:
    """The slope of every objective along its own weight with its t interval over prompts, by logged names.

    With ``before``, an evaluation of the same prompts, the change since then.
    """
    each = [
        preference_slopes(e.scores, e.grid_index, e.positions, e.grid).diagonal(dim1=1, dim2=2)  # (P, K)
        for e in (evaluation, before)
        if e is not None
    ]
    limits = t_interval(each[0] if before is None else each[0] - each[1])
    found = {}
    for k, name in enumerate(evaluation.names):
        for suffix, part in zip(("", "_low", "_high"), limits, strict=True):
            if part[k].isfinite():
                found[f"steerability/{name}{suffix}"] = float(part[k])
    return found


def bootstrap(evaluation: Evaluation, reference_point: float, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """HV, MIP and CRD of resamples of the prompts, ``(draws, 3)``.

    Answers to one prompt stay together. Two evaluations of the same prompts get the same resamples, so that the
    difference of their values is that of pairs.

    A resample repeats prompts and so has less spread than the prompts themselves, and a determinant even less: the
    values of CRD are scaled to have the estimate as their mean.
    """
    moments = zip(*resampled_moments(sums_of(evaluation), draws, seed), strict=True)
    drawn = np.array([front_figures(*pair, evaluation.grid, reference_point) for pair in moments])
    estimate, dispersion = point_estimates(evaluation, reference_point)["front/crd"], drawn[:, 2]
    if estimate > 0 and np.nansum(dispersion) > 0:
        drawn[:, 2] *= estimate / np.nanmean(dispersion)
    return drawn


def with_interval(values: Mapping[str, float], drawn: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Figures and the limits of their intervals, ``.._low`` and ``.._high``; what is NaN is left out.

    Percentile intervals for MIP and CRD. HV is flattered by noise, and a resample's even more: it has no interval, but
    ``front/hv_corrected``, from which the bias is taken that resampling shows, has a basic one.
    """
    found: dict[str, float] = {}
    for key, column in zip(KEYS, drawn.T, strict=True):
        if not np.isfinite(values[key]):
            continue
        low, high = np.nanquantile(column, [(1 - level) / 2, (1 + level) / 2])
        found[key] = values[key]
        if key == "front/hv":
            key, low, high = "front/hv_corrected", 2 * values[key] - high, 2 * values[key] - low
            found[key] = 2 * values["front/hv"] - float(np.nanmean(column))
        found |= {f"{key}_low": float(low), f"{key}_high": float(high)}
    return found


def overlap(evaluation: Evaluation) -> float:
    """Of the rewards under neighbouring preferences; NaN where it cannot be told."""
    if len(evaluation.grid) < 2 or not evaluation.scores.isfinite().all(-1).any():
        return float("nan")
    return float(reward_overlap(evaluation.scores, evaluation.grid_index, evaluation.grid))


def same_prompts(one: Evaluation, other: Evaluation) -> bool:
    return one.positions.unique().equal(other.positions.unique()) and one.grid.equal(other.grid)
