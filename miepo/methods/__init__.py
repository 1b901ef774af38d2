"""Methods that need a module of their own. All others are configurations of the parts (``configs/methods``)."""

from miepo.methods.ric import RewardsInContext, RewardsInContextDataModule, TargetConditioning

__all__ = ["RewardsInContext", "RewardsInContextDataModule", "TargetConditioning"]
