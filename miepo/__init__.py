"""miepo: one preference-conditioned policy for every trade-off between objectives (MI-EPO, arXiv 2607.01392)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miepo.renamed import install

if TYPE_CHECKING:
    from miepo.data.module import OnlinePreferenceDataModule
    from miepo.errors import ObjectiveError, UserError
    from miepo.methods.mi_epo import MIEPO
    from miepo.objectives import Objective
    from miepo.policy import GatedConditioning, Policy, PromptConditioning
    from miepo.trained import TrainedPolicy, load

__version__ = "0.1.0"

install()

# imported when they are asked for: most of them need torch and Lightning, which take seconds
_MODULES = {
    "MIEPO": "miepo.methods.mi_epo",
    "GatedConditioning": "miepo.policy",
    "Objective": "miepo.objectives",
    "ObjectiveError": "miepo.errors",
    "OnlinePreferenceDataModule": "miepo.data.module",
    "Policy": "miepo.policy",
    "PromptConditioning": "miepo.policy",
    "TrainedPolicy": "miepo.trained",
    "UserError": "miepo.errors",
    "load": "miepo.trained",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'miepo' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
