"""Objectives: what the policy is asked to be. Each one is a Lightning callback that scores responses."""

from miepo.objectives.base import Objective
from miepo.objectives.brevity import Brevity
from miepo.objectives.cheerfulness import Cheerfulness, CheerfulWords
from miepo.objectives.harmlessness import Harmlessness
from miepo.objectives.python_objective import PythonObjective
from miepo.objectives.relevance import Relevance
from miepo.objectives.retrying import RetryingObjective
from miepo.objectives.reward_model import ModelObjective, RewardModel, ScoreModel
from miepo.renamed import old_names

__all__ = [
    "Brevity",
    "CheerfulWords",
    "Cheerfulness",
    "Harmlessness",
    "ModelObjective",
    "Objective",
    "PythonObjective",
    "Relevance",
    "RetryingObjective",
    "RewardModel",
    "ScoreModel",
]

__getattr__ = old_names(__name__, Patient=RetryingObjective)
