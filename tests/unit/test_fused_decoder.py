"""The fused decoder against the network that trains, token by token."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig, Qwen2Config, Qwen3Config

from miepo.errors import UserError
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.rollout import fused_decoder as decoding
from miepo.rollout import transformers_engine as module
from miepo.rollout.fused_decoder import FusedDecoder, fits
from miepo.rollout.transformers_engine import draw_tokens
from tests.helpers.tiny import randomise_adapter, tiny_policy, tiny_tokenizer

PROMPTS = ["the garden", "people like rain when it comes"]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
NETWORKS = {
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **SHAPE),  # biases
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=12, **SHAPE),  # norms of queries and keys
    "mistral": lambda v: MistralConfig(vocab_size=v, sliding_window=None, **SHAPE),
}


def save(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide what is left out
                parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    root, size = tmp_path_factory.mktemp("networks"), len(tiny_tokenizer())
    return {"llama": tiny_model} | {name: save(root / name, make(size)) for name, make in NETWORKS.items()}


def expected_logits(policy: Policy, prompts: list[str], w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of every token of ``rows`` ``(N, T)``, without a cache and without padding."""
    out = []
    for prompt, weights, row in zip(prompts, w, rows, strict=True):
        ids = policy.template.encode(prompt, policy.preference_text(weights.tolist()))
        with policy.conditioned(weights.unsqueeze(0)):
            logits = policy.model(input_ids=torch.tensor([[*ids, *row.tolist()]])).logits[0]
        out.append(logits[len(ids) - 1 : len(ids) - 1 + len(row)])
    return torch.stack(out)  # (N, T, V)


def in_bfloat16(policy: Policy) -> Policy:
    """Round the base's weights as those of a model that was published in bfloat16."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no kernels for half precision")
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.bfloat16().float())
    return policy


def test_half_precision_is_for_weights_that_it_holds() -> None:
    weight = torch.randn(64, 32)
    assert not decoding.holds_in_half([weight])  # of 24 bits
    published = weight.bfloat16().float()
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert decoding.holds_in_half([published, (1e-4 * published).bfloat16().float()])
    assert not decoding.holds_in_half([published, weight])
    assert not decoding.holds_in_half([1e6 * published])  # beyond its range
    assert not decoding.holds_in_half([published.where(published < 1, torch.nan)])
    assert not decoding.holds_in_half([published.bfloat16()])


def test_the_copy_in_half_precision_is_made_once_and_follows_the_weights(
    networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = in_bfloat16(randomise_adapter(tiny_policy(networks["qwen2"], [GatedConditioning()])))
    packed: list[int] = []
    asked = decoding.holds_in_half
    monkeypatch.setattr(decoding, "holds_in_half", lambda weights: packed.append(len(weights)) or asked(weights))

    def sample(policy: Policy) -> torch.Tensor:
        return TransformersEngine().sample(policy, PROMPTS, W, 2, 5, 0).tokens.ids

    first, layers = sample(policy), len(policy.body.layers)
    assert sorted(packed) == sorted([1] + [3, 1, 2, 1] * layers)  # the head, and four products of a layer
    assert torch.equal(sample(policy), first)
    randomise_adapter(policy, seed=1)
    assert not torch.equal(sample(policy), first)  # the new adapter was read
    assert len(packed) == 1 + 4 * layers
    with torch.no_grad():
        policy.body.layers[0].mlp.down_proj.base_layer.weight.zero_()
    sample(policy)
    assert len(packed) == 2 + 4 * layers
    count = len(decoding._HALVES)
    del policy
    gc.collect()
    assert len(decoding._HALVES) <= count - 1 - 4 * layers  # the copies go with the weights


@pytest.mark.parametrize("network", ["llama", *NETWORKS])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize(
    ("ordered", "fixed", "half"),  # on a CPU, elsewhere
    [(True, False, False), (True, False, True), (False, False, False), (False, True, False), (True, True, True)],
)
def test_logits_are_those_of_the_network(
    networks: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    targets: Any,
    ordered: bool,
    fixed: bool,
    half: bool,
) -> None:
    monkeypatch.setattr(decoding, "orders_weights", lambda weight: ordered)
    ways = [GatedConditioning(), PromptConditioning()]
    policy = randomise_adapter(tiny_policy(networks[network], ways, lora_targets=targets))
    assert fits(policy)
    if half:
        in_bfloat16(policy)
    attention = policy.body.layers[0].self_attn
    projection = decoding._Projection.of([attention.q_proj, attention.k_proj], 4, True)
    assert isinstance(projection, decoding._HalfProjection) == half
    rows = torch.randint(5, 100, (4, 5), generator=torch.Generator().manual_seed(0))  # two responses per prompt
    with policy.evaluating():
        decoder = FusedDecoder(policy, policy.encode(PROMPTS, W), W, 2, 6, fixed)
        logits = [decoder.start(), *(decoder.next(rows[:, t]) for t in range(2))]
        decoder.keep(torch.tensor([3, 0]))
        later = [decoder.next(rows[[3, 0], t]) for t in range(2, 4)]
        expected = expected_logits(policy, [p for p in PROMPTS for _ in range(2)], W.repeat_interleave(2, 0), rows)
    torch.testing.assert_close(torch.stack(logits, 1), expected[:, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(later, 1), expected[[3, 0], 3:5], rtol=1e-4, atol=1e-4)


def test_a_recording_is_of_one_token_and_made_anew_when_rows_leave(
    networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph demands, with a stand-in: the same function on the same memory, twice for the first token."""
    functions = []

    def recorded(function: Any) -> Any:
        functions.append(function)
        function()  # a graph runs it once before it records, and recording leaves no trace
        return function

    monkeypatch.setattr(decoding, "recorded", recorded)
    policy = randomise_adapter(tiny_policy(networks["llama"], [GatedConditioning()]))
    rows = torch.randint(5, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    found = []
    with policy.evaluating():
        for records in (False, True):
            decoder = FusedDecoder(policy, policy.encode(PROMPTS, W), W, 2, 7, fixed=True)
            decoder.records = records
            memory = [decoder.tokens.data_ptr(), decoder.bias.data_ptr(), *(k.data_ptr() for k in decoder.keys)]
            logits = [decoder.next(rows[:, t]) for t in range(3)]
            assert memory == [decoder.tokens.data_ptr(), decoder.bias.data_ptr(), *(k.data_ptr() for k in decoder.keys)]
            decoder.keep(torch.tensor([3, 0]))
            found.append([*logits, *(decoder.next(rows[[3, 0], t]) for t in range(3, 6))])
    torch.testing.assert_close(found[1], found[0])
    assert len(functions) == 2


def test_weights_laid_out_for_decoding_stay_those_of_the_network(
    networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second copy: the network reads the same memory; once laid out it stays, and moved it is laid out anew."""
    monkeypatch.setattr(decoding, "orders_weights", lambda weight: False)
    policy = randomise_adapter(tiny_policy(networks["qwen2"], [GatedConditioning()]))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    attention = policy.body.layers[0].self_attn

    def places() -> list[int]:
        return [getattr(attention, f"{name}_proj").base_layer.weight.data_ptr() for name in "qkv"]

    def sample(seed: int) -> torch.Tensor:
        return TransformersEngine().sample(policy, PROMPTS, W, 2, 5, seed).tokens.ids

    first = sample(0)
    q, k, v = places()
    size = attention.k_proj.base_layer.weight.nbytes
    assert (k - q, v - k) == (2 * size, size)
    randomise_adapter(policy, seed=1)
    other = sample(0)
    assert places() == [q, k, v]
    assert not torch.equal(first, other)  # the new adapter was read
    policy.double().float()
    assert places() != [q, k, v]
    assert torch.equal(sample(0), other)
    q, k, v = places()
    assert (k - q, v - k) == (2 * size, size)
    for name, value in policy.state_dict().items():
        assert "lora" in name or torch.equal(value, before[name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_which_networks_are_decoded_how(
    networks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    config = GPTNeoXConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=1,
    )  # fmt: skip
    other = tiny_policy(save(tmp_path / "neox", config), [GatedConditioning()])
    assert not fits(other)
    assert TransformersEngine().sample(other, PROMPTS, W, 2, 4, 0).tokens.ids.shape[:2] == (2, 2)

    used = []
    monkeypatch.setattr(module, "FusedDecoder", lambda *a: used.append(1) or FusedDecoder(*a))
    TransformersEngine(fused=fused).sample(tiny_policy(networks["llama"]), PROMPTS, W, 2, 4, 0)
    assert bool(used) == fused


def test_a_response_does_not_depend_on_when_others_end(networks: dict[str, Path]) -> None:
    """Rows leave the batch; what is left is sampled as if they had stayed."""
    policy = randomise_adapter(tiny_policy(networks["llama"], [GatedConditioning()]))
    policy.end_ids = []
    free = TransformersEngine().sample(policy, PROMPTS, W, 8, 16, 3).tokens.ids.flatten(0, 1)
    policy.end_ids = free[:12, 1].unique().tolist()  # most rows end early now
    ended = TransformersEngine().sample(policy, PROMPTS, W, 8, 16, 3).tokens
    lengths = ended.mask.flatten(0, 1).sum(-1)
    assert (lengths < 4).sum() >= 8
    for row, mask, whole in zip(ended.ids.flatten(0, 1), ended.mask.flatten(0, 1), free, strict=True):
        assert torch.equal(row[mask], whole[: len(row)][mask])


def test_each_prompt_has_a_draw_of_its_own(networks: dict[str, Path]) -> None:
    """A function of its seed and not of the batch; two alike with one seed say the same, with two they do not."""
    policy = randomise_adapter(tiny_policy(networks["llama"], [PromptConditioning()])).eval()
    w, engine = torch.tensor([[0.5, 0.5]]), TransformersEngine()
    four = engine.sample(policy, ["the garden"] * 4, w.expand(4, 2), 3, 12, [5, 6, 5, 7]).texts
    assert four[0] == four[2]
    assert four[0] != four[1] != four[3]
    assert len({*four[0]}) == 3
    assert engine.sample(policy, ["the garden"], w, 3, 12, [6]).texts == [four[1]]


def test_generate_and_the_decoder_sample_one_distribution(networks: dict[str, Path]) -> None:
    """Mean log-probability of second tokens, which the first tests do not reach: both engines agree within noise."""
    policy = randomise_adapter(tiny_policy(networks["llama"], [GatedConditioning(), PromptConditioning()]))
    means = []
    for fused in (True, False):
        y = TransformersEngine(fused=fused).sample(policy, PROMPTS, W, 600, 4, 7).tokens
        with policy.evaluating():
            value = policy.response_log_prob(PROMPTS, W.unsqueeze(1), y)[:, :, 0].sum(-1)  # (2, 600)
        means.append((value.mean(1), value.std(1) / 600**0.5))
    difference = (means[0][0] - means[1][0]).abs()
    assert (difference < 4 * (means[0][1] ** 2 + means[1][1] ** 2).sqrt()).all()


def test_tokens_are_drawn_by_their_probability() -> None:
    """Every height between 0 and 1 at even steps: counts are probabilities but for one step, in any block."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 1000, generator=g)
    logits[0, 300:500] = -torch.inf
    n = 20_000
    chosen = draw_tokens(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    counts = torch.bincount(chosen, minlength=1000).double()
    assert (counts - n * logits[0].double().softmax(-1)).abs().max() < 1.1
    assert counts[300:500].sum() == 0


def test_the_ends_of_the_unit_interval_are_tokens_that_can_come() -> None:
    logits = torch.full((2, 600), -torch.inf)
    logits[:, [10, 270]] = 0.0
    assert draw_tokens(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)).tolist() == [10, 270]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_tokens_all_the_same(value: float) -> None:
    """Of the vocabulary, so that the engine can say what is wrong."""
    for size in (600, 512):
        logits = torch.zeros(2, size)
        logits[1] = value
        assert draw_tokens(logits, torch.tensor([0.5, 0.5], dtype=torch.float64)).max() < size


def test_weights_that_are_no_numbers_are_told(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    assert policy.model.config.vocab_size % 256  # there is a last block that is not full
    for parameter in policy.adapter_parameters().values():
        parameter.data.fill_(torch.nan)
    with pytest.raises(UserError, match="the policy's logits are not numbers: expected a finite learning rate"):
        TransformersEngine().sample(policy, PROMPTS, W, 2, 4, 0)


def test_a_recording_needs_the_fused_decoder() -> None:
    with pytest.raises(UserError, match=r"expected engine.fused true, got false"):
        TransformersEngine(fused=False, cuda_graph=True)
