"""Sampling engines: they turn prompts and preference vectors into responses of the current policy."""

from miepo.rollout.engine import RolloutEngine
from miepo.rollout.server_engine import ServerEngine
from miepo.rollout.transformers_engine import TransformersEngine
from miepo.rollout.vllm_engine import VLLMEngine

__all__ = ["RolloutEngine", "ServerEngine", "TransformersEngine", "VLLMEngine"]
