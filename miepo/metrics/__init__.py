"""What is measured: obedience, the Pareto front, and the information that responses carry about their preference."""

from miepo.metrics.front import (
    conditional_reward_dispersion,
    hypervolume,
    mean_inner_product,
    mip_parts,
    reward_overlap,
)
from miepo.metrics.information import (
    PreferenceInformationMetric,
    feedback_information,
    infonce_bound,
    pointwise_information,
)
from miepo.metrics.pareto_front import ParetoFrontMetric
from miepo.metrics.resampling import AnswerSums, HypervolumeEstimate, estimate_hypervolume
from miepo.metrics.steerability import (
    SteerabilityMetric,
    follows,
    interval_figures,
    preference_slopes,
    rank_correlation,
    t_interval,
)

__all__ = [
    "AnswerSums",
    "HypervolumeEstimate",
    "ParetoFrontMetric",
    "PreferenceInformationMetric",
    "SteerabilityMetric",
    "conditional_reward_dispersion",
    "estimate_hypervolume",
    "feedback_information",
    "follows",
    "hypervolume",
    "infonce_bound",
    "interval_figures",
    "mean_inner_product",
    "mip_parts",
    "pointwise_information",
    "preference_slopes",
    "rank_correlation",
    "reward_overlap",
    "t_interval",
]
