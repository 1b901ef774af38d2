"""What vLLM calls in each of its processes: the entry point ``miepo`` of the group ``vllm.general_plugins``."""

from __future__ import annotations

import os

from miepo.vllm import gates
from miepo.vllm.resolver import ENVIRONMENT
from miepo.vllm.resolver import register as register_resolver


def register() -> None:
    """Install gates, and the resolver where the environment names policies."""
    gates.install()
    if text := os.environ.get(ENVIRONMENT):
        register_resolver(text)
