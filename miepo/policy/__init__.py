"""The preference-conditioned policy: a causal language model, a LoRA adapter and a conditioning."""

from miepo.policy.conditioning import Conditioning, GatedConditioning, PromptConditioning
from miepo.policy.policy import Policy

__all__ = ["Conditioning", "GatedConditioning", "Policy", "PromptConditioning"]
