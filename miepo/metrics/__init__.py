"""What is measured: the Pareto front and the information that responses carry about their preference."""

from miepo.metrics.front import (
    ParetoFrontMetric,
    conditional_reward_dispersion,
    hypervolume,
    mean_inner_product,
    reward_overlap,
)
from miepo.metrics.information import (
    PreferenceInformationMetric,
    bootstrap_interval,
    feedback_information,
    infonce_bound,
    pointwise_information,
)

__all__ = [
    "ParetoFrontMetric",
    "PreferenceInformationMetric",
    "bootstrap_interval",
    "conditional_reward_dispersion",
    "feedback_information",
    "hypervolume",
    "infonce_bound",
    "mean_inner_product",
    "pointwise_information",
    "reward_overlap",
]
