"""Public preference data sets: prompts for the online stage, responses to fine-tune on and to normalise by."""

from miepo.data.datasets.base import Comparison, PreferenceDataset
from miepo.data.datasets.hh_rlhf import HHRLHF
from miepo.data.datasets.safe_rlhf import SafeRLHF

__all__ = ["HHRLHF", "Comparison", "PreferenceDataset", "SafeRLHF"]
