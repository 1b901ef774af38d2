"""What can be tested of the vLLM engine without vLLM; with it, see ``tests/integration/test_vllm.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

from miepo.errors import UserError
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.policy.base_model import load_base
from miepo.rollout import VLLMEngine
from tests.helpers.tiny import randomise_adapter, tiny_policy

W = torch.tensor([[0.2, 0.8]])


@pytest.mark.parametrize("way", [GatedConditioning(), PromptConditioning()])
def test_under_one_preference_a_gated_adapter_is_plain_lora(tiny_model: Path, tmp_path: Path, way) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [way])).eval()
    policy.save_adapter(tmp_path, policy.gate_of(W))
    plain = PeftModel.from_pretrained(load_base(str(tiny_model), "float32")[0], str(tmp_path)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), policy.conditioned(W):
        torch.testing.assert_close(plain(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_an_adapter_is_written_when_it_has_changed(tiny_model: Path) -> None:
    policy, engine = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()])), VLLMEngine()
    first = engine._adapter(policy, policy.gate_of(W))
    assert engine._adapter(policy, policy.gate_of(W)) == first
    other = engine._adapter(policy, policy.gate_of(1 - W))
    assert other != first  # another preference is another plain adapter
    next(iter(policy.adapter_parameters().values())).data.add_(0)  # nobody sees what happens to .data
    with torch.no_grad():
        next(iter(policy.adapter_parameters().values())).add_(1)  # as an optimiser does
    assert engine._adapter(policy, policy.gate_of(W)).name not in (first.name, other.name)
    assert not first.folder.exists()


def test_without_vllm_it_says_what_to_install(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    policy = tiny_policy(tiny_model, [GatedConditioning()])
    with pytest.raises(UserError, match="pip install vllm"):
        VLLMEngine().sample(policy, ["x"], W, 2, 4, 0)


def test_what_vllm_refuses_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise TypeError(f"unexpected keyword argument {sorted(settings)[-1]!r}")

    fake = {
        "vllm": {"SamplingParams": None, "LLM": refuse},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": None},
    }
    for name, content in fake.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(
        UserError, match=r"vLLM does not start with memory 0.4 and the options \{'wrong': 1\}: unexpected"
    ):
        VLLMEngine(options={"wrong": 1}).sample(tiny_policy(tiny_model, [GatedConditioning()]), ["x"], W, 2, 4, 0)


@pytest.mark.parametrize(
    ("given", "message"), [({"adapters": 0}, "at least 1"), ({"memory": 1.5}, "share of the card")]
)
def test_bad_settings(given, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(**given)
