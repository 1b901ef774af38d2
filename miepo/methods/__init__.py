"""Methods that need a module of their own. All others are configurations of the parts (``configs/methods``)."""

from miepo.methods.ric.conditioning import TargetConditioning
from miepo.methods.ric.data import RewardsInContextDataModule
from miepo.methods.ric.module import RewardsInContext
from miepo.methods.sft.data import SupervisedDataModule
from miepo.methods.sft.module import SupervisedFineTuning

__all__ = [
    "RewardsInContext",
    "RewardsInContextDataModule",
    "SupervisedDataModule",
    "SupervisedFineTuning",
    "TargetConditioning",
]
