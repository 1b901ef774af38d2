"""Slopes, HV, MIP and CRD of an evaluation from its answers, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np
import torch
from torch import Tensor

from miepo.evaluation import Answers
from miepo.metrics import (
    conditional_reward_dispersion,
    estimate_hypervolume,
    interval_figures,
    mean_inner_product,
    mip_parts,
    preference_slopes,
    reward_overlap,
    t_interval,
)
from miepo.metrics.front import front_figures, hypervolumes
from miepo.metrics.resampling import (
    DRAWS,
    AnswerSums,
    jackknife_interval,
    moments_without_each,
    resampled_moments,
)

KEYS = ("front/hv", "front/mip", "front/crd")


def sums_of(answers: Answers) -> AnswerSums:
    """Sum the rewards of answers, for each prompt and preference vector."""
    return AnswerSums.of(answers.scores, answers.grid_index, answers.positions, len(answers.grid))


def point_estimates(answers: Answers, reference_point: float) -> dict[str, float]:
    """Return HV, MIP and CRD by their logged names."""
    moments = sums_of(answers).moments()
    return dict(zip(KEYS, front_figures(*moments, answers.grid, reference_point), strict=True))


def chance_of(answers: Answers, reference_point: float) -> dict[str, float]:
    """Return what of HV is above chance, and of MIP follows the preference, by their logged names.

    What is NaN is left out.
    """
    sums = sums_of(answers)
    estimate = estimate_hypervolume(sums, reference_point)
    level, covariance = mip_parts(answers.grid, sums.moments()[0])
    found = {"front/hv_above_chance": estimate.above_chance, "front/hv_p": estimate.p_value}
    found |= {"front/mip_level": float(level), "front/mip_covariance": float(covariance)}
    return {key: value for key, value in found.items() if np.isfinite(value)}


def slopes_of(answers: Answers, before: Answers | None = None) -> dict[str, float]:
    """Return the slope of every objective along its own weight with its t interval over prompts, by logged names.

    With ``before``, answers of an earlier evaluation to the same prompts, the change since then.
    """
    slopes = [
        preference_slopes(e.scores, e.grid_index, e.positions, e.grid).diagonal(dim1=1, dim2=2)  # (P, K)
        for e in (answers, before)
        if e is not None
    ]
    interval = t_interval(slopes[0] if before is None else slopes[0] - slopes[1])  # (K,) each
    found: dict[str, Tensor] = {}
    for k, name in enumerate(answers.names):
        found |= interval_figures(f"steerability/{name}", [part[k] for part in interval])
    return {key: float(figure) for key, figure in found.items() if figure.isfinite()}


def front_of(
    answers: Answers, reference_point: float, before: Answers | None = None, draws: int = DRAWS
) -> dict[str, float]:
    """Return HV, MIP and CRD with their 95 % intervals over prompts, by logged names; what is NaN is left out.

    HV is flattered by noise, and a resample's even more: it has no interval, but ``front/hv_corrected``, from which the
    bias is taken that resampling the prompts shows, has a basic one. MIP and CRD have t intervals with the jackknife's
    standard error; CRD's is that of its logarithm, and there is none where a covariance hangs on one prompt.

    With ``before``, answers of an earlier evaluation to the same prompts, the changes since then, with intervals of
    pairs.
    """
    points = [point_estimates(e, reference_point) for e in (answers, before) if e is not None]
    found = {key: points[0][key] - (points[1][key] if before else 0.0) for key in KEYS}
    found = {key: value for key, value in found.items() if np.isfinite(value)}
    sums = [sums_of(e) for e in (answers, before) if e is not None]
    if len(sums[0].count) < 2:
        return found

    def change(of: Callable[[AnswerSums], Tensor]) -> Tensor:
        return of(sums[0]) - of(sums[1]) if before else of(sums[0])

    limits = {}
    if (hv := found.get("front/hv")) is not None:
        drawn = change(lambda s: torch.from_numpy(hypervolumes(resampled_moments(s, draws)[0], reference_point)))
        found["front/hv_corrected"] = 2 * hv - float(drawn.mean())
        limits["front/hv_corrected"] = 2 * hv - drawn.quantile(0.975), 2 * hv - drawn.quantile(0.025)
    if (mip := found.get("front/mip")) is not None:
        without = change(lambda s: mean_inner_product(answers.grid, moments_without_each(s)[0]))  # (P,)
        limits["front/mip"] = jackknife_interval(mip, without)
    spare = min(int((s.count.sum(0) - s.count).min()) for s in sums)  # answers under a vector without one prompt
    if (crd := found.get("front/crd")) is not None and spare > answers.grid.shape[1]:
        without = change(lambda s: conditional_reward_dispersion(moments_without_each(s)[1]))  # (P,)
        if before:
            limits["front/crd"] = jackknife_interval(crd, without)
        elif crd > 0:
            low, high = jackknife_interval(log(crd), without.clamp(min=0).log())
            limits["front/crd"] = low.exp(), high.exp()
    for key, (low, high) in limits.items():
        if low.isfinite() and high.isfinite():
            found |= {f"{key}_low": float(low), f"{key}_high": float(high)}
    return found


def overlap(answers: Answers) -> float:
    """Return the overlap of rewards under neighbouring preferences; NaN where it cannot be told."""
    if len(answers.grid) < 2 or not answers.scores.isfinite().all(-1).any():
        return float("nan")
    return float(reward_overlap(answers.scores, answers.grid_index, answers.grid))


def same_prompts(one: Answers, other: Answers) -> bool:
    """Return whether two evaluations have the same prompts and preference vectors."""
    return one.positions.unique().equal(other.positions.unique()) and one.grid.equal(other.grid)
