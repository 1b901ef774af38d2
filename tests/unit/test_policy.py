from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miepo.errors import UserError
from miepo.policy import Conditioning, GatedConditioning, Policy, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.types import Tokens
from tests.helpers.tiny import randomise_adapter, tiny_policy

PROMPTS = ["the garden", "people like rain in spring", "food"]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])
WAYS = {
    "prompt": [PromptConditioning()],
    "gated": [GatedConditioning()],
    "gated alone": [GatedConditioning(shared=False)],
    "both": [GatedConditioning(), PromptConditioning()],
}


def responses(policy: Policy, texts: tuple[str, ...] = (" is good", " it", " to grow food"), extra: int = 0) -> Tokens:
    rows = [policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    width = max(map(len, rows)) + extra
    ids = torch.tensor([r + [policy.tokenizer.pad_token_id] * (width - len(r)) for r in rows])
    return Tokens(ids, torch.arange(width) < torch.tensor([[len(r)] for r in rows]))


def naive_log_prob(policy: Policy, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """One sequence, no padding, whole logits."""
    ids = torch.tensor([prompt + response])
    logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_prob_is_that_of_the_plain_model_without_padding(tiny_model: Path, way: str, temperature: float) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS[way], temperature=temperature))
    y = responses(policy)
    ours = policy.log_prob(policy.encode(PROMPTS, W), W, y)
    for i, prompt in enumerate(PROMPTS):
        ids = policy.template.encode(prompt, policy.preference_text(W[i].tolist()))
        with policy.conditioned(W[i : i + 1]):
            expected = naive_log_prob(policy, ids, y.ids[i][y.mask[i]].tolist(), temperature)
        torch.testing.assert_close(ours[i][y.mask[i]], expected, rtol=1e-4, atol=1e-5)
        assert (ours[i][~y.mask[i]] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_padding_width_changes_nothing(tiny_model: Path, way: str) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, WAYS[way])).double()
    policy.dtype = "float64"
    x, y, wide = policy.encode(PROMPTS, W), responses(policy), responses(policy, extra=9)
    pad = torch.full((3, 7), policy.tokenizer.pad_token_id)
    wide_x = Tokens(torch.cat([pad, x.ids], 1), torch.cat([torch.zeros(3, 7, dtype=torch.bool), x.mask], 1))
    torch.testing.assert_close(
        policy.log_prob(wide_x, W, wide)[:, : y.ids.shape[1]], policy.log_prob(x, W, y), rtol=1e-6, atol=1e-6
    )


def test_gate_is_the_sum_of_its_blocks(tiny_model: Path) -> None:
    """delta W(w) = B_0 A_0 + sum_k w_k B_k A_k, checked by adding it to the base weights of a plain model."""
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()]))
    r, scale = policy.lora_rank, policy.lora_alpha / policy.lora_rank
    y = responses(policy)
    ours = policy.log_prob(policy.encode(PROMPTS, W), W, y)
    for i, prompt in enumerate(PROMPTS):
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        factors = [1.0, *W[i].tolist()]
        with torch.no_grad():
            for name, module in plain.named_modules():
                if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                    continue
                adapted = policy.model.get_base_model().get_submodule(name)
                a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
                for k, factor in enumerate(factors):
                    block = slice(k * r, (k + 1) * r)
                    module.weight += scale * factor * (b[:, block] @ a[block])
            ids = policy.template.encode(prompt)
            response = y.ids[i][y.mask[i]].tolist()
            logits = plain(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(ours[i][y.mask[i]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["gated", "both", "prompt"])
def test_the_preference_changes_the_policy_and_the_reference_stays(tiny_model: Path, way: str) -> None:
    policy = tiny_policy(tiny_model, WAYS[way])
    x, y = policy.encode(PROMPTS, W), responses(policy)
    start = policy.reference_log_prob(x, y)
    assert torch.equal(policy.log_prob(x, W, y).detach(), start)  # B = 0: the policy starts as the reference
    randomise_adapter(policy)
    assert torch.equal(policy.reference_log_prob(x, y), start)
    other = W.flip(1)
    assert not torch.allclose(policy.log_prob(policy.encode(PROMPTS, other), other, y)[0], policy.log_prob(x, W, y)[0])
    assert policy.reference_depends_on_preference == (way != "gated")
    assert not start.requires_grad


def test_the_gate_is_set_for_every_sequence_or_the_pass_fails(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, [GatedConditioning()])
    with pytest.raises(RuntimeError, match="without a preference vector"):
        policy.model(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(RuntimeError, match="the gate is for 2 sequences"), policy.conditioned(W[:2]):
        policy.model(input_ids=torch.tensor([[5, 6]]))


def test_exactly_the_adapter_trains(tiny_model: Path) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()]))
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    optimizer = torch.optim.Adam(policy.adapter_parameters().values(), lr=0.1)
    policy.log_prob(policy.encode(PROMPTS, W), W, responses(policy)).sum().backward()
    optimizer.step()
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(policy.adapter_parameters())
    assert all("lora_" in name for name in moved)


def test_gradient_checkpointing_recomputes_under_the_same_gate(tiny_model: Path) -> None:
    """Two passes under different preferences, one backward: the recomputation must not see the last gate."""
    gradients = []
    for checkpointing in (False, True):
        policy = randomise_adapter(
            tiny_policy(tiny_model, [GatedConditioning()], gradient_checkpointing=checkpointing)
        ).train()
        x, y, other = policy.encode(PROMPTS, W), responses(policy), W.flip(1)
        loss = policy.log_prob(x, W, y).sum() - 0.3 * policy.log_prob(x, other, y).square().sum()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.adapter_parameters().items()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_one_hot_gates_leave_the_other_blocks_untouched(tiny_model: Path) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning(shared=False)]))
    w = torch.tensor([[1.0, 0.0]] * 3)
    policy.log_prob(policy.encode(PROMPTS, w), w, responses(policy)).sum().backward()
    r = policy.lora_rank
    for name, parameter in policy.adapter_parameters().items():
        blocks = parameter.grad.split(r, 0 if "lora_A" in name else 1)
        assert blocks[0].abs().sum() > 0
        assert blocks[1].abs().sum() == 0


@pytest.mark.parametrize("conditioning", Conditioning.__subclasses__())
def test_contract_conditionings_act_by_text_or_by_gate(conditioning: type[Conditioning]) -> None:
    c, names = conditioning(), ["a", "b"]
    text, blocks = c.write([0.25, 0.75], names), c.blocks(2)
    assert text or blocks
    if blocks:
        assert c.gate(W).shape == (3, blocks)
    if text:
        assert text.startswith(" ")
        assert all(marker in text for marker in c.markers(names))
        assert text != c.write([0.75, 0.25], names)


def test_prompt_conditioning_writes_names_then_numbers() -> None:
    assert PromptConditioning().write([0.3, 0.7], ["helpfulness", "humor"]) == " <helpfulness> 0.30 <humor> 0.70"
    for weights in ([0.005, 0.995], torch.tensor([0.005, 0.995]).tolist()):
        assert PromptConditioning().write(weights, ["a", "b"]) == " <a> 0.01 <b> 0.99"


def test_encoding_pads_on_the_left(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model, [GatedConditioning()])
    tokens = policy.encode(PROMPTS, W)
    for i, prompt in enumerate(PROMPTS):
        assert tokens.ids[i][tokens.mask[i]].tolist() == policy.template.encode(prompt)
        assert tokens.mask[i].tolist() == sorted(tokens.mask[i].tolist())


def test_evaluating_restores_the_mode(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model).train()
    with policy.evaluating():
        assert not policy.model.training
        assert not torch.is_grad_enabled()
    assert policy.model.training


class Pathed(PromptConditioning):
    """Keeps what a checkpoint cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path("x")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "int8"}, "dtype must be"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_targets": "*proj"}, "policy.lora_targets must be all-linear, .* got '[*]proj': nothing to repeat"),
        ({"conditioning": [Pathed()]}, "Pathed goes into every checkpoint: expected attributes that are text"),
    ],
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy("x", **kwargs)


def test_bad_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none"):
        Policy(str(tmp_path / "missing")).build(["a"])
    with pytest.raises(UserError, match="expected a model file"):
        Policy(str(tmp_path / "missing.gguf")).build(["a"])
    with pytest.raises(UserError, match="expected a causal language model"):
        Policy(str(tmp_path)).build(["a"])


def test_a_tokenizer_beyond_the_embedding(tiny_model: Path, tmp_path: Path) -> None:
    """Tokens were added, and the model was not resized: what a template writes of them has no embedding."""

    def add(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|bot|>"]})
        tokenizer.save_pretrained(folder)

    base = changed(tmp_path / "base", tiny_model, add)
    tiny_policy(Path(base))
    with pytest.raises(UserError, match=r"the template's token '<\|bot\|>' has the id \d+, and the model embeds"):
        tiny_policy(Path(base), template="{prompt}{preference}<|bot|>")


def test_a_base_without_its_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    def forget(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    with pytest.raises(UserError, match=r"tokenizer from one of: .*\w"):  # and not the announcement alone
        tiny_policy(Path(changed(tmp_path / "base", tiny_model, forget)))


def changed(folder: Path, model: Path, change: Callable[[Path], object]) -> str:
    copytree(model, folder)
    change(folder)
    return str(folder)


def edit(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]),
    "weights that are none": lambda f: (f / "model.safetensors").write_bytes(b"no weights"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "a size of another type": lambda f: edit(f / "config.json", lambda c: c.update(hidden_size="large")),
    "sizes that do not fit": lambda f: edit(f / "config.json", lambda c: c.update(num_attention_heads=5)),
    "a configuration that is a list": lambda f: (f / "config.json").write_text("[]"),
    "a configuration cut off": lambda f: (f / "config.json").write_text('{"model_type": "lla'),
    "a tokenizer cut off": lambda f: (f / "tokenizer.json").write_text('{"version'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_one_sentence(tiny_model: Path, tmp_path: Path, name: str) -> None:
    base = changed(tmp_path / "base", tiny_model, BROKEN[name])
    with pytest.raises(UserError, match=re.escape(base)):
        tiny_policy(Path(base))


@pytest.mark.parametrize("template", ["{% for", "{{ messages[3]['content'] }}", "{{ 1 / 0 }}", "hello"])
def test_a_broken_chat_template_is_one_sentence(tiny_model: Path, tmp_path: Path, template: str) -> None:
    base = changed(tmp_path / "base", tiny_model, lambda f: (f / "chat_template.jinja").write_text(template))
    with pytest.raises(UserError, match="expected a chat template"):
        tiny_policy(Path(base))


def test_padding_that_the_model_has_no_embedding_of(tiny_model: Path, tmp_path: Path) -> None:
    """As of tokenizers to which [PAD] was added; an end token stands in, whose places nothing reads."""

    def add(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)

    policy = randomise_adapter(tiny_policy(Path(changed(tmp_path / "base", tiny_model, add))))
    plain = randomise_adapter(tiny_policy(tiny_model))
    assert policy.tokenizer.pad_token_id < len(policy._head.weight)
    y = responses(plain)
    torch.testing.assert_close(
        policy.log_prob(policy.encode(PROMPTS, W), W, y), plain.log_prob(plain.encode(PROMPTS, W), W, y)
    )


def test_ends_that_the_generation_settings_alone_name(tiny_model: Path, tmp_path: Path) -> None:
    def forget(folder: Path, also: bool = False) -> None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                edit(folder / name, lambda c: [c.pop(key, None) for key in ("eos_token", "pad_token")])
        edit(folder / "generation_config.json", lambda c: c.pop("eos_token_id", None) if also else None)
        edit(folder / "config.json", lambda c: c.pop("eos_token_id", None) if also else None)

    policy = tiny_policy(Path(changed(tmp_path / "base", tiny_model, forget)))
    assert policy.end_ids == [policy.tokenizer.pad_token_id] == [1]
    assert policy.tokenizer.eos_token_id is None
    sampled = TransformersEngine().sample(policy, PROMPTS, W, 2, 4, 0)
    assert len(sampled.texts) == 3
    with pytest.raises(UserError, match="expected a tokenizer or model with an end-of-text token, this one has none"):
        tiny_policy(Path(changed(tmp_path / "none", tiny_model, lambda folder: forget(folder, also=True))))


def test_bad_targets(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="it has no layer out_proj, but down_proj, gate_proj, k_proj"):
        tiny_policy(tiny_model, lora_targets=["q_proj", "out_proj"])
    with pytest.raises(UserError, match=r"lora_targets \['nowhere'\] do not fit"):
        tiny_policy(tiny_model, lora_targets=["nowhere"])


def test_upper_layers_alone(tiny_model: Path) -> None:
    """Only the last layers have an adapter; what it computes there is what a whole adapter does with zeros below."""
    upper = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()], lora_layers=1))
    names = [*upper.adapter_parameters()]
    assert names
    assert all(".layers.1." in name for name in names)
    assert upper.settings()["lora_layers"] == 1
    whole = tiny_policy(tiny_model, [GatedConditioning()])
    with torch.no_grad():
        for name, parameter in whole.adapter_parameters().items():
            parameter.copy_(upper.get_parameter(name) if name in names else torch.zeros_like(parameter))
    y = responses(upper)
    one, other = (p.log_prob(p.encode(PROMPTS, W), W, y) for p in (upper, whole))
    torch.testing.assert_close(one, other)
    one.sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in upper.adapter_parameters().items() if "lora_A" in n
    )
    sampled = [TransformersEngine().sample(p, PROMPTS, W, 2, 6, 0).texts for p in (upper, whole)]
    assert sampled[0] == sampled[1]
    assert [*tiny_policy(tiny_model, lora_layers=2).adapter_parameters()] == [*whole.adapter_parameters()]
    assert "lora_layers" not in whole.settings()


@pytest.mark.parametrize(
    ("layers", "message"), [(3, "at most the network's 2 layers, got 3"), (0, "at least 1, got 0")]
)
def test_bad_numbers_of_layers(tiny_model: Path, layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_policy(tiny_model, lora_layers=layers)


def test_bfloat16_base_keeps_a_float32_adapter(tiny_model: Path) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()], dtype="bfloat16"))
    assert {p.dtype for p in policy.adapter_parameters().values()} == {torch.float32}
    exact = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()]))
    y = responses(policy)
    low, high = (p.log_prob(p.encode(PROMPTS, W), W, y) for p in (policy, exact))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.1, atol=0.15)
