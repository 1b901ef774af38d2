"""The layers below the adapter, computed once: the same values and gradients as the plain way, in fewer products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, LlamaModel, Qwen3Config

from miepo.exploration import InfoNCE, Matching, PairwiseInformation
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.types import Tokens
from tests.helpers.fit import rollout, step, tiny_run
from tests.helpers.tiny import randomise_adapter, tiny_policy, tiny_tokenizer
from tests.unit.test_fused_decoder import SHAPE, save

PROMPTS = ["the garden", "people like rain when it comes", "food"]
W = torch.tensor([[[0.2, 0.8], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]], [[0.3, 0.7], [0.6, 0.4]]])  # (B, C, K)
READ = torch.tensor([[[1, 1], [1, 0], [0, 0]], [[0, 1], [1, 1], [1, 0]], [[0, 0], [0, 0], [0, 0]]]).bool()  # (B, n, C)
LAYERS = 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), **SHAPE | {"num_hidden_layers": LAYERS})
    return save(tmp_path_factory.mktemp("deep"), config)


def answers(seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5, 1, 3], [4, 5, 2], [5, 5, 5]])
    ids = torch.randint(5, 100, (3, 3, 5), generator=generator)
    return Tokens(ids, torch.arange(5) < lengths.unsqueeze(-1))


def deep_policy(folder: Path, upper: int | None = 2, **settings: Any) -> Policy:
    ways = settings.pop("conditioning", [GatedConditioning()])
    return randomise_adapter(tiny_policy(folder, ways, lora_layers=upper, **settings))


def gradients(policy: Policy, value: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
    return list(torch.autograd.grad((weights * value).sum(), list(policy.adapter_parameters().values())))


def test_in_bfloat16_it_differs_by_rounding(deep: Path) -> None:
    policy, tokens = deep_policy(deep, dtype="bfloat16"), answers()
    assert policy.trunk_layers == 2
    found = policy.response_log_prob(PROMPTS, W, tokens, READ)
    policy.trunk_layers = 0
    torch.testing.assert_close(found, policy.response_log_prob(PROMPTS, W, tokens, READ), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_values_and_gradients_are_those_of_the_whole_network(deep: Path, given: bool, checkpointing: bool) -> None:
    policy, tokens = deep_policy(deep, gradient_checkpointing=checkpointing), answers()
    assert policy.shares_trunk
    assert policy.trunk_layers == 2
    trunk = policy.trunk(PROMPTS, tokens, READ.any(-1)) if given else None
    found = policy.response_log_prob(PROMPTS, W, tokens, READ, trunk)
    learnt = gradients(policy, found)
    policy.trunk_layers = 0
    expected = policy.response_log_prob(PROMPTS, W, tokens, READ)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected[..., 0, :] - expected[..., 1, :])[READ.all(-1)].abs().max() > 0.01  # the gate acts
    for a, b in zip(learnt, gradients(policy, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_reference_stands_on_the_same_trunk(deep: Path) -> None:
    policy, tokens = deep_policy(deep), answers()
    expected = policy.reference_response_log_prob(PROMPTS, W[:, :1], tokens, READ.any(-1, keepdim=True))
    trunk = policy.trunk(PROMPTS, tokens, READ.any(-1))
    found = policy.reference_response_log_prob(PROMPTS, W[:, :1], tokens, READ.any(-1, keepdim=True), trunk)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert trunk is not None
    assert not trunk.states.requires_grad


def test_some_of_the_prompts_have_their_part_of_a_trunk(deep: Path) -> None:
    """Micro-batches take some of the prompts, and a trunk may be made in several passes, too."""
    policy, tokens = deep_policy(deep), answers()
    whole = policy.response_log_prob(PROMPTS, W, tokens, READ)
    policy.max_tokens_per_micro_batch = 8
    trunk = policy.trunk(PROMPTS, tokens, READ.any(-1))
    assert trunk is not None
    for part in (slice(0, 1), slice(1, 3)):
        some = Tokens(tokens.ids[part], tokens.mask[part])
        found = policy.response_log_prob(PROMPTS[part], W[part], some, READ[part], trunk[part])
        torch.testing.assert_close(found, whole[part], rtol=1e-5, atol=1e-5)


def test_the_lower_layers_run_once(deep: Path, tmp_path: Path) -> None:
    """For the reference, w+ and w-, of a whole step; counted in tokens that pass through a layer."""
    seen = [0] * LAYERS
    module, batch, _ = rollout(deep, tmp_path, policy={"lora_layers": 2}, module={"exploration": InfoNCE(0.1)})
    for i, layer in enumerate(module.policy.body.layers):
        layer.register_forward_hook(lambda layer, inputs, out, i=i: seen.__setitem__(i, seen[i] + inputs[0].shape[1]))
    step(module, batch)
    assert batch.trunk is not None
    assert seen[:2] == [0, 0]  # the rollout has done that
    assert seen[2] == seen[3] > 0
    trunk = module.policy.trunk(batch.prompts, batch.responses.tokens, batch.compared)
    assert seen[0] == seen[1] == len(trunk.states)
    torch.testing.assert_close(trunk.states, batch.trunk.states)


@pytest.mark.parametrize("term", [InfoNCE(0.1), InfoNCE(0.0), Matching(1.0), PairwiseInformation()])
def test_a_step_learns_the_same(deep: Path, tmp_path: Path, term: Any) -> None:
    module, batch, _ = rollout(
        deep, tmp_path, policy={"lora_layers": 2, "lora_dropout": 0.1, "max_tokens_per_micro_batch": 30},
        module={"exploration": term}, data={"responses": 4},
    )  # fmt: skip
    assert batch.trunk is not None
    torch.manual_seed(0)
    loss, learnt = step(module, batch)
    module.policy.trunk_layers = 0
    torch.manual_seed(0)
    expected, gradients = step(module, replace(batch, trunk=None))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(learnt[name], gradient, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_alike_there_is_no_trunk(deep: Path) -> None:
    assert deep_policy(deep, None).trunk_layers == 0  # every layer is adapted
    assert deep_policy(deep, None, lora_targets=r".*layers\.[13]\..*q_proj").trunk_layers == 1
    written = deep_policy(deep, conditioning=[GatedConditioning(), PromptConditioning()])
    assert not written.shares_trunk
    assert written.trunk(PROMPTS, answers(), READ.any(-1)) is None
    policy = deep_policy(deep)
    policy.leave_trees()
    assert not policy.shares_trunk


def test_dropout_below_the_adapter_forbids_it(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), attention_dropout=0.1, **SHAPE | {"num_hidden_layers": LAYERS}
    )
    assert deep_policy(save(tmp_path / "dropout", config)).trunk_layers == 0


@pytest.mark.parametrize("kind", [GemmaConfig, Qwen3Config])
def test_other_networks_of_layers_have_one(tmp_path: Path, kind: Any) -> None:
    config = kind(vocab_size=len(tiny_tokenizer()), head_dim=8, **SHAPE | {"num_hidden_layers": LAYERS})
    policy, tokens = deep_policy(save(tmp_path / "network", config)), answers()
    assert policy.trunk_layers == 2
    found = policy.response_log_prob(PROMPTS, W, tokens, READ)
    policy.trunk_layers = 0
    torch.testing.assert_close(found, policy.response_log_prob(PROMPTS, W, tokens, READ), rtol=1e-5, atol=1e-5)


def test_a_network_that_takes_no_states_is_read_whole(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaModel.forward

    def forward(self: Any, input_ids: Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        return plain(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    assert deep_policy(deep).trunk_layers == 0


def test_a_network_that_scales_what_it_is_given_is_found_out(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States between its layers cannot be given back, and the check of the policy says so."""
    plain = LlamaModel.forward

    def scaled(self: Any, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        return plain(self, *args, inputs_embeds=None if inputs_embeds is None else 2 * inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    assert deep_policy(deep).trunk_layers == 0


def test_a_run_without_a_trunk_and_with_one_go_alike(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(Policy, "shares_trunk", property(lambda self: False))
        torch.manual_seed(0)  # the adapter begins alike
        trainer, module, data = tiny_run(deep, tmp_path, policy={"lora_layers": 2}, trainer={"max_steps": 3})
        trainer.fit(module, data)
        adapters.append(torch.cat([p.detach().flatten() for p in module.policy.adapter_parameters().values()]))
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-5)
