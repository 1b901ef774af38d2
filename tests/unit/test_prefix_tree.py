"""Sequences that share their beginnings against the same sequences one by one: values, gradients, work."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    Qwen3Config,
)

from miepo.policy import Conditioning, GatedConditioning, Policy, PromptConditioning, tree_attention
from miepo.policy.prefix_tree import micro_batches, pack, tree_size
from miepo.types import Tokens
from tests.helpers.tiny import randomise_adapter, tiny_policy, tiny_tokenizer

PROMPTS = ["the garden", "people like rain in spring when it is good", "food"]
W = torch.tensor([[[0.1, 0.9], [1.0, 0.0]], [[0.3, 0.7], [0.35, 0.65]], [[0.5, 0.5], [0.5, 0.5]]])  # (B, C, K)
WAYS = {
    "prompt": [PromptConditioning()],
    "gated": [GatedConditioning(shared=False)],
    "both": [GatedConditioning(), PromptConditioning()],
}


def some_responses() -> Tokens:
    """Of all lengths: one token, and as many as there are."""
    ids = torch.randint(5, 100, (3, 3, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[6, 1, 3], [2, 2, 5], [4, 6, 1]])
    return Tokens(ids, torch.arange(6) < lengths.unsqueeze(-1))


def one_by_one(policy: Policy, responses: Tokens, w: torch.Tensor, reference: bool = False) -> torch.Tensor:
    """No shared computation and no padding: ``(B, n, C, T)``."""
    out = torch.zeros(3, 3, 2, 6)
    for b, n, c in torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2)).tolist():
        length = int(responses.mask[b, n].sum())
        y = Tokens(responses.ids[b, n, :length].unsqueeze(0), torch.ones(1, length).bool())
        x = policy.encode([PROMPTS[b]], w[b, c : c + 1])
        value = policy.reference_log_prob(x, y) if reference else policy.log_prob(x, w[b, c : c + 1], y)
        out[b, n, c, :length] = value[0]
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("product_keys", [0, 512])  # by the kernel, by products
def test_values_and_gradients_are_those_of_the_sequences_one_by_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, way: str, checkpointing: bool, product_keys: int
) -> None:
    monkeypatch.setattr(tree_attention, "PRODUCT_KEYS", product_keys)
    upstream = torch.randn(3, 3, 2, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for together in (True, False):
        policy = tiny_policy(tiny_model, WAYS[way], gradient_checkpointing=checkpointing, temperature=0.7)
        policy = randomise_adapter(policy).train()
        assert policy.plain_attention
        y = some_responses()
        value = policy.response_log_prob(PROMPTS, W, y) if together else one_by_one(policy, y, W)
        (value * upstream).sum().backward()
        results.append((value.detach(), {n: p.grad for n, p in policy.adapter_parameters().items()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_reference(tiny_model: Path, way: str) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS[way]))
    y = some_responses()
    ours = policy.reference_response_log_prob(PROMPTS, W, y)
    torch.testing.assert_close(ours, one_by_one(policy, y, W, reference=True), rtol=1e-4, atol=1e-5)
    assert not ours.requires_grad


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
OTHERS = {
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 12}, True),
    "neox": (GPTNeoXConfig, {"intermediate_size": 48}, True),
    "window": (MistralConfig, {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4}, False),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Those that attend to all that came before take trees; others get padded sequences."""
    kind, settings, takes_trees = OTHERS[name]
    torch.manual_seed(0)
    config = kind(vocab_size=len(tiny_tokenizer()), bos_token_id=None, eos_token_id=1, **SHAPE, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = randomise_adapter(tiny_policy(tmp_path, WAYS["both"]))
    assert policy.plain_attention == takes_trees
    y = some_responses()
    expected = one_by_one(policy, y, W)
    if not takes_trees:
        monkeypatch.setattr("miepo.policy.policy.pack", None)
    torch.testing.assert_close(policy.response_log_prob(PROMPTS, W, y), expected, rtol=1e-4, atol=1e-5)
    wanted = torch.eye(3, 2).bool().expand(3, -1, -1)  # (B, n, C)
    some = policy.response_log_prob(PROMPTS, W, y, wanted)
    torch.testing.assert_close(some, torch.where(wanted.unsqueeze(-1), expected, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "prompts_computed"), [("prompt", 1), ("gated", 2)])
def test_a_prompt_is_computed_once(tiny_model: Path, way: str, prompts_computed: int) -> None:
    """Two preferences in text share the prompt in front of them; the gate changes every state."""
    policy = tiny_policy(tiny_model, WAYS[way])
    prompt, seen = "people like rain in spring when it is good " * 5, []
    layer = next(m for n, m in policy.model.named_modules() if n.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    y = Tokens(torch.full((1, 2, 4), 7), torch.ones(1, 2, 4).bool())
    policy.response_log_prob([prompt], W[:1], y)
    (rows, length, _), whole = seen[0], len(policy.template.encode(prompt))
    # beside the prompt: text of two preferences, and responses without their last tokens, under each
    assert rows * length <= prompts_computed * whole + 2 * 30 + 4 * 3


def test_every_place_sees_its_path_and_nothing_else() -> None:
    prompts = [[[1] * 10, [1] * 8 + [2]], [[3] * 3, [3] * 3]]
    packed = pack(prompts, [[[[5, 6, 7], [8]]] * 2] * 2, 3, True, torch.float32)
    length = 8 + (2 + 2) + (1 + 2) + 3 + 2 * 2  # no filling; a last token predicts nothing
    assert packed.ids.shape == (1, length)
    sees = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for run in packed.branches.runs:
        n, tokens = run.queries.shape
        index = torch.arange(start, start + n * tokens).view(n, tokens)
        start += n * tokens
        for i in range(n):
            for t in range(tokens):
                if (packed.branches.order == index[i, t]).any():  # not padding
                    sees[run.queries[i, t], run.keys[i][run.bias[i, 0, t] == 0]] = True
                assert (run.bias[i, 0, t] == 0).any()  # what sees nothing would be NaN
    assert len(set(packed.branches.order.tolist())) == length
    assert sees.diagonal().all()
    assert not sees.triu(1).any()
    assert torch.equal(sees.sum(-1), packed.positions[0] + 1)
    assert sees[-1].nonzero().flatten().tolist() == [15, 16, 17, 20, 21]  # 18 and 19 answer under the other preference


def test_sizes_and_passes() -> None:
    prompts = [[[1] * 10, [1] * 8 + [2]], [[3] * 3, [3] * 3]]
    answers = [[[5, 6, 7], [8]], [[5, 6, 7], []]]  # the second response is not read under the second preference
    for share in (True, False):
        sizes = [tree_size(under, answers, share) for under in prompts]
        assert sum(sizes) == pack(prompts, [answers] * 2, 3, share, torch.float32).ids.shape[1]
    assert micro_batches([3, 3, 3, 9, 1], 6) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert micro_batches([3, 3], 10) == [slice(0, 2)]
    # as many as another process needs
    assert micro_batches([3, 3, 3, 9, 1], 6, 5) == [slice(i, i + 1) for i in range(5)]
    assert micro_batches([1, 1, 1], 10, 2) == [slice(0, 1), slice(1, 3)]
    assert micro_batches([3, 3], 10, 4) == [slice(0, 1), slice(1, 2), slice(1, 2), slice(1, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_without_gradient_prompts_go_in_several_passes(tiny_model: Path, way: str) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS[way]))
    lengths: list[int] = []
    policy.body.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with policy.evaluating():
        whole = policy.response_log_prob(PROMPTS, W, some_responses())
        policy.max_tokens_per_micro_batch = 1
        torch.testing.assert_close(policy.response_log_prob(PROMPTS, W, some_responses()), whole)
    assert len(lengths) == 4
    assert sum(lengths[1:]) == lengths[0]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_wanted_is_not_computed(tiny_model: Path, way: str) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS[way]))
    y, places = some_responses(), []
    policy.body.register_forward_pre_hook(
        lambda _, args, kwargs: places.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    wanted = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(2)) < 0.5
    wanted[:, 0] = True  # something of each prompt under each preference
    whole, some = (policy.response_log_prob(PROMPTS, W, y, w) for w in (None, wanted))
    torch.testing.assert_close(some, torch.where(wanted.unsqueeze(-1), whole, 0.0), rtol=1e-4, atol=1e-5)
    tokens = (y.mask.sum(-1, keepdim=True) - 1).expand(-1, -1, 2)  # the last one predicts nothing
    assert places[0] - places[1] == int(tokens[~wanted].sum())
    nothing = wanted.clone()
    nothing[1, :, 1] = False  # of the second prompt under the second preference
    less = policy.response_log_prob(PROMPTS, W, y, nothing)
    torch.testing.assert_close(less, torch.where(nothing.unsqueeze(-1), whole, 0.0), rtol=1e-4, atol=1e-5)
    prompt = policy.template.encode(PROMPTS[1], policy.preference_text(W[1, 1].tolist()))
    other = policy.template.encode(PROMPTS[1], policy.preference_text(W[1, 0].tolist()))
    shared = 0 if policy.gated else len([*takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))])
    if policy.gated or prompt != other:
        tokens_less = int(tokens[wanted].sum() - tokens[nothing].sum())
        assert places[1] - places[2] == len(prompt) - shared + tokens_less
    assert not policy.response_log_prob(PROMPTS, W, y, torch.zeros_like(wanted)).any()
    assert len(places) == 3  # the network was not asked
    reference = [policy.reference_response_log_prob(PROMPTS, W, y, w) for w in (None, wanted)]
    torch.testing.assert_close(reference[1], torch.where(wanted.unsqueeze(-1), reference[0], 0.0), rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_training(tiny_model: Path) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS["both"], lora_dropout=0.5)).train()
    y = some_responses()
    first, second = (policy.response_log_prob(PROMPTS, W, y) for _ in range(2))
    assert not torch.allclose(first, second)
    assert any(isinstance(m, nn.Dropout) and m.training for m in policy.modules())


def test_contract_of_every_conditioning(tiny_model: Path) -> None:
    """Whatever way w takes, it reaches the policy."""
    for kind in Conditioning.__subclasses__():
        policy = randomise_adapter(tiny_policy(tiny_model, [kind()]))
        out = policy.response_log_prob(PROMPTS, W, some_responses())
        assert not torch.allclose(out[0, :, 0], out[0, :, 1])
        torch.testing.assert_close(out[2, :, 0], out[2, :, 1])  # twice the same preference
