"""Methods that need a module of their own. All others are configurations of the parts (``configs/methods``)."""

from miepo.methods.ric import RewardsInContext, RewardsInContextDataModule, TargetConditioning
from miepo.methods.sft import SupervisedDataModule, SupervisedFineTuning

__all__ = [
    "RewardsInContext",
    "RewardsInContextDataModule",
    "SupervisedDataModule",
    "SupervisedFineTuning",
    "TargetConditioning",
]
