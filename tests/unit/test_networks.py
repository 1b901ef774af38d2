"""Networks that are not Llama: log-probabilities, gates and merged models against Transformers and PEFT alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from miepo.errors import UserError
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.policy.network_check import check_layers
from miepo.policy.policy import _Gate
from miepo.policy.prefix_tree import pack
from miepo.rollout import TransformersEngine
from tests.helpers.tiny import randomise_adapter, tiny_policy, tiny_tokenizer
from tools.architectures import PREFERENCES, compare

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_LIKE = {"num_key_value_heads": 2, "intermediate_size": 48}


def save(folder: Path, kind: type[PreTrainedConfig], **settings: Any) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = kind(vocab_size=len(tiny_tokenizer()), bos_token_id=0, eos_token_id=1, **(sizes | settings))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(chat=False).save_pretrained(folder)
    return folder


EQUAL = {
    "experts, by the prompt": (MixtralConfig, {**LLAMA_LIKE, "num_local_experts": 4}, "prompt", "all-linear"),
    "experts, attention gated": (MixtralConfig, {**LLAMA_LIKE, "num_local_experts": 4}, "gate", ATTENTION),
    "a body under another's name": (
        Llama4TextConfig,
        {**LLAMA_LIKE, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "pad_token_id": 0},
        "gate",
        ATTENTION,
    ),
    "a multiplier under another's name": (HyperCLOVAXConfig, {**LLAMA_LIKE, "logits_scaling": 8.0}, "gate", "all-linear"),
    "a divisor": (GraniteConfig, {**LLAMA_LIKE, "logits_scaling": 8.0}, "gate", "all-linear"),
    "a layer in front of the head": (BertConfig, {"intermediate_size": 48, "is_decoder": True}, "prompt", "all-linear"),
    "tokens below each other": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gate", "all-linear"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of PEFT alone
@pytest.mark.parametrize("name", EQUAL)
def test_log_probabilities_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    kind, settings, way, targets = EQUAL[name]
    gap, policy, _ = compare(save(tmp_path, kind, **settings), way, targets)
    assert gap < 1e-5
    assert policy.own_head == (kind in (HyperCLOVAXConfig, BertConfig))


def test_a_cap_that_no_configuration_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's own head does what its configuration does not say: found by what comes out."""
    plain = LlamaForCausalLM.forward

    def capped(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    base = save(tmp_path, LlamaConfig, **LLAMA_LIKE)
    uncapped, policy, _ = compare(base, "gate", "all-linear")
    assert uncapped < 1e-5
    assert not policy.own_head
    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    gap, policy, _ = compare(base, "gate", "all-linear")
    assert gap < 1e-5
    assert policy.own_head


def test_the_gradient_through_a_networks_own_head(tmp_path: Path) -> None:
    """A layer in front of the head is adapted, too, and none of its gradient is lost."""
    save(tmp_path, BertConfig, intermediate_size=48, is_decoder=True)
    policy = randomise_adapter(tiny_policy(tmp_path, [PromptConditioning()])).eval()
    w = PREFERENCES[:1]
    ids, answer = policy.template.encode("the garden", policy.preference_text(w[0].tolist())), [9, 22, 40]
    policy.trees_log_prob([[ids]], w, [[[answer]]], 3).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
    policy.zero_grad()
    whole = torch.tensor([[*ids, *answer]])
    logits = policy.causal_lm(input_ids=whole).logits[0, len(ids) - 1 : -1]
    logits.log_softmax(-1).gather(-1, torch.tensor(answer).unsqueeze(1)).sum().backward()
    assert any("transform" in name for name in ours)
    for name, p in policy.adapter_parameters().items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5)


REFUSED = {
    "experts under a gate": (MixtralConfig, {**LLAMA_LIKE, "num_local_experts": 4}, {}, "names experts"),
    "a recurrent network that reads its padding": (
        RecurrentGemmaConfig,
        {"intermediate_size": 48, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
        {},
        "padded or not, got RecurrentGemmaForCausalLM",
    ),
    "an embedding": (LlamaConfig, LLAMA_LIKE, {"lora_targets": ["q_proj", "embed_tokens"]}, "of type Embedding"),
    "a head under a gate": (
        LlamaConfig,
        LLAMA_LIKE,
        {"lora_targets": ["q_proj", "lm_head"]},
        "the gate does not fit the layers",
    ),
    "both ways": (BertConfig, {"intermediate_size": 48, "is_decoder": False}, {}, "it reads tokens that come later"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(tmp_path: Path, name: str) -> None:
    kind, settings, options, message = REFUSED[name]
    save(tmp_path, kind, **settings)
    with pytest.raises(UserError, match=message):
        tiny_policy(tmp_path, [GatedConditioning(shared=False)], **options)


@pytest.mark.parametrize("wrong", [lambda value: value.flip(0 if len(value) > 1 else 1), torch.ones_like])
def test_a_gate_of_another_row_or_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A layer whose rows are not sequence by sequence gets other rows' gates: found by what comes out."""
    save(tmp_path, OPTConfig, ffn_dim=48, word_embed_proj_dim=32)
    tiny_policy(tmp_path, [GatedConditioning(shared=False)])
    plain = _Gate.apply

    def gated(gate: _Gate, *args: Any) -> torch.Tensor:
        with gate.set(None if gate.value is None else wrong(gate.value)):
            return plain(gate, *args)

    monkeypatch.setattr(_Gate, "apply", gated)
    with pytest.raises(UserError, match="differ from the network's own by"):
        tiny_policy(tmp_path, [GatedConditioning(shared=False)])


def test_a_gate_is_followed_in_a_rollout_where_tokens_lie_below_each_other(tmp_path: Path) -> None:
    """What is sampled under a preference is likelier under it than under the other's, by so many nats a token."""
    save(tmp_path, OPTConfig, ffn_dim=48, word_embed_proj_dim=32)
    policy = randomise_adapter(tiny_policy(tmp_path, [GatedConditioning(shared=False)], lora_alpha=32))
    w, prompts = torch.eye(2), ["the garden", "the garden"]
    tokens = TransformersEngine().sample(policy, prompts, w, 200, 3, [1, 2]).tokens
    own, other = (
        policy.response_log_prob(prompts, v.unsqueeze(1), tokens).squeeze(2)[tokens.mask].mean() for v in (w, w.flip(0))
    )
    assert own > other + 0.1


def test_only_lora_layers_train(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, [GatedConditioning()])
    policy.body.norm.weight.requires_grad_()
    with pytest.raises(UserError, match=r"expected parameters of LoRA layers alone to train, got '.*norm.weight'"):
        check_layers(policy)


def test_trees_that_a_network_does_not_take_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, LlamaConfig, **LLAMA_LIKE)
    wrong = lambda *args, **kwargs: (p := pack(*args, **kwargs), p.positions.mul_(2), p)[-1]  # noqa: E731
    monkeypatch.setattr("miepo.policy.policy.pack", wrong)
    policy = tiny_policy(tmp_path, [GatedConditioning()])
    assert not policy.plain_attention


def test_building_leaves_the_adapter_at_zero_and_the_random_state_alone(tiny_model: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    built = tiny_policy(tiny_model, [GatedConditioning()])
    assert all((p == 0).all() for name, p in built.adapter_parameters().items() if "lora_B" in name)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.rand(3), expected)


MERGED = {
    "linear": (LlamaConfig, LLAMA_LIKE),
    "experts": (MixtralConfig, LLAMA_LIKE),
    "experts laid out the other way, with a bias": (
        GptOssConfig,
        {**LLAMA_LIKE, "num_local_experts": 4, "head_dim": 8},
    ),
    "Conv1D": (GPT2Config, {}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["attention", "lm_head"], "all-linear"])
@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_is_the_policy(tmp_path: Path, name: str, targets: str | list[str], tied: bool) -> None:
    """Experts included, and a head that was the embedding and was adapted."""
    kind, settings = MERGED[name]
    save(tmp_path / "base", kind, **settings, tie_word_embeddings=tied)
    if targets != "all-linear":
        targets = ["c_attn" if kind is GPT2Config else "q_proj", "lm_head"]
    policy = randomise_adapter(tiny_policy(tmp_path / "base", [PromptConditioning()], lora_targets=targets))
    assert policy.save_merged(tmp_path / "merged") == pytest.approx(1, abs=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 22, 40, 8]])
    with policy.evaluating():
        torch.testing.assert_close(merged(ids).logits, policy.causal_lm(ids).logits, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings == (tied and targets == "all-linear")
    assert policy.causal_lm.config.tie_word_embeddings == tied
