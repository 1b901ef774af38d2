"""Rewarded Soups as a configuration: the gate without a shared block, trained on the corners of the simplex."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from miepo.exploration import InfoNCE
from miepo.policy import GatedConditioning, Policy
from miepo.preferences import CornerPreferences
from tests.helpers.fit import tiny_run
from tests.helpers.tiny import randomise_adapter, tiny_policy

RANK = 2


def soup(model: Path, **kwargs) -> Policy:
    return randomise_adapter(tiny_policy(model, [GatedConditioning(shared=False)], lora_rank=RANK, **kwargs))


def layers(policy: Policy) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in policy.model.named_modules() if isinstance(m, LoraLayer)}


def logits(policy: Policy, w: torch.Tensor) -> torch.Tensor:
    tokens = policy.encode(["the garden", "people like rain"], w.expand(2, -1))
    with policy.evaluating(), policy.conditioned(w.expand(2, -1)):
        return policy.model(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits


def expert(model: Path, policy: Policy, weights: list[float]) -> torch.nn.Module:
    """A plain PEFT model, without miepo, with ``sum_k w_k B_k A_k`` as weights of its own."""
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    modules = dict(base.named_modules())
    with torch.no_grad():
        for name, layer in layers(policy).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for k, w in enumerate(weights):
                block = slice(k * RANK, (k + 1) * RANK)
                modules[name].weight += w * layer.scaling["default"] * b[:, block] @ a[block]
    return base


def peft_model(model: Path, policy: Policy, columns: slice, rank: int, scale: float) -> torch.nn.Module:
    """An ordinary LoRA model made by PEFT, with ``columns`` of the soup's rank dimension and zeros beside them."""
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    alpha = scale * rank
    plain = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
    )
    theirs = {n.removeprefix("base_model.model."): m for n, m in plain.named_modules() if isinstance(m, LoraLayer)}
    place = columns if rank > RANK else slice(0, rank)
    with torch.no_grad():
        for name, layer in layers(policy).items():
            a, b = theirs[name].lora_A["default"].weight, theirs[name].lora_B["default"].weight
            b.zero_()
            a[place] = layer.lora_A["default"].weight[columns]
            b[:, place] = layer.lora_B["default"].weight[:, columns]
    return plain.eval()


@pytest.mark.parametrize("k", [0, 1])
def test_one_hot_returns_the_expert_bit_for_bit(tiny_model: Path, k: int) -> None:
    """The expert as an ordinary adapter in PEFT. In the same shape it agrees to the last bit; with its own block alone,
    whose products have another inner dimension, to rounding."""
    policy, w = soup(tiny_model), torch.eye(2)[k]
    tokens = policy.encode(["the garden", "people like rain"], w.expand(2, -1))
    block, own = slice(k * RANK, (k + 1) * RANK), logits(policy, w)
    for rank in (2 * RANK, RANK):
        plain = peft_model(tiny_model, policy, block, rank, policy.lora_alpha / RANK)
        with torch.no_grad():
            expected = plain(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits
        assert torch.equal(own, expected) if rank > RANK else torch.allclose(own, expected, atol=1e-5)
    assert not torch.allclose(logits(policy, torch.eye(2)[1 - k]), own, atol=1e-2)


def test_one_hot_does_not_see_the_other_expert(tiny_model: Path) -> None:
    policy, w = soup(tiny_model), torch.tensor([1.0, 0.0])
    before = logits(policy, w)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            rows = parameter if "lora_A" in name else parameter.T
            rows[RANK:] = 1e3
    assert torch.equal(logits(policy, w), before)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8]])
def test_the_average_is_one_of_delta_w_and_not_of_the_factors(tiny_model: Path, weights: list[float]) -> None:
    policy = soup(tiny_model)
    tokens = policy.encode(["the garden", "people like rain"], torch.tensor(weights).expand(2, -1))
    with torch.no_grad():
        expected = expert(tiny_model, policy, weights)(tokens.ids, attention_mask=tokens.mask.long()).logits
    own = logits(policy, torch.tensor(weights))
    mask = tokens.mask
    torch.testing.assert_close(own[mask], expected[mask], rtol=1e-3, atol=1e-4)


def test_each_expert_learns_from_its_own_prompts_alone(tiny_model: Path, tmp_path: Path) -> None:
    """A step on prompts of the first corner leaves the second expert as it was, bit for bit."""

    class First(CornerPreferences):
        def draw(self, rng, count, objectives):
            return np.tile([1.0, 0.0], (count, 1))

    trainer, module, data = tiny_run(
        tiny_model, tmp_path, conditioning=[GatedConditioning(shared=False)], data={"preferences": First()},
        module={"exploration": InfoNCE(0.0)}, trainer={"max_steps": 2},
    )  # fmt: skip
    before: dict[str, torch.Tensor] = {}
    build = module.policy.build

    def keep(names, device=None):
        build(names, device)
        randomise_adapter(module.policy)
        before.update({n: p.detach().clone() for n, p in module.policy.adapter_parameters().items()})

    module.policy.build = keep
    trainer.fit(module, data)
    r = module.policy.lora_rank
    moved = 0.0
    for name, parameter in module.policy.adapter_parameters().items():
        now, then = (x if "lora_A" in name else x.T for x in (parameter.detach(), before[name]))
        assert torch.equal(now[r:], then[r:]), name
        moved += (now[:r] - then[:r]).abs().sum().item()
    assert moved > 0
