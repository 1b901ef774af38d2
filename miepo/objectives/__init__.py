"""Objectives: what the policy is asked to be. Each one is a Lightning callback that scores responses."""

from miepo.objectives.base import Objective
from miepo.objectives.brevity import Brevity
from miepo.objectives.cheerfulness import Cheerfulness, CheerfulWords
from miepo.objectives.harmlessness import Harmlessness
from miepo.objectives.patient import Patient
from miepo.objectives.python_objective import PythonObjective
from miepo.objectives.relevance import Relevance
from miepo.objectives.reward_model import ModelObjective, RewardModel, ScoreModel

__all__ = [
    "Brevity",
    "CheerfulWords",
    "Cheerfulness",
    "Harmlessness",
    "ModelObjective",
    "Objective",
    "Patient",
    "PythonObjective",
    "Relevance",
    "RewardModel",
    "ScoreModel",
]
