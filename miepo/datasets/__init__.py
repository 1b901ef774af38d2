"""Public preference data sets: prompts for the online stage, responses to fine-tune on and to normalise by."""

from miepo.datasets.base import Comparison, PreferenceDataset
from miepo.datasets.hh_rlhf import HHRLHF
from miepo.datasets.safe_rlhf import SafeRLHF

__all__ = ["HHRLHF", "Comparison", "PreferenceDataset", "SafeRLHF"]
