"""miepo: one preference-conditioned policy for every trade-off between objectives (MI-EPO, arXiv 2607.01392)."""

from miepo.data.module import OnlinePreferenceDataModule
from miepo.errors import ObjectiveError, UserError
from miepo.methods.mi_epo import MIEPO
from miepo.objectives import Objective
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.renamed import install
from miepo.trained import TrainedPolicy, load

__version__ = "0.1.0"

install()

__all__ = [
    "MIEPO",
    "GatedConditioning",
    "Objective",
    "ObjectiveError",
    "OnlinePreferenceDataModule",
    "Policy",
    "PromptConditioning",
    "TrainedPolicy",
    "UserError",
    "load",
]
