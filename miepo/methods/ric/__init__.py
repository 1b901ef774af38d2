"""Rewards-in-Context (RiC): imitate responses under the scores they got, then ask for the scores one wants.

An offline stage trains on responses of the base policy, or of a file, with their normalised scores written in the
prompt. Online rounds then sample under wanted scores, score, write the scores *obtained* into the prompt, keep what is
good at something and train on that. At inference a preference vector becomes target scores, see
:func:`~miepo.methods.ric.conditioning.preference_to_target`.
"""

from miepo.methods.ric.conditioning import TargetConditioning
from miepo.methods.ric.data import RewardsInContextDataModule
from miepo.methods.ric.module import RewardsInContext

__all__ = ["RewardsInContext", "RewardsInContextDataModule", "TargetConditioning"]
