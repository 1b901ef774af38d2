"""The plan on paper: counts against the network itself, how times scale, the split against a plain search."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from miepo.errors import UserError
from tools import cluster_plan as plan
from tools.benchmark import Products, operations
from tools.memory import TEXT

H100, USUAL, STEP = plan.GPUS["H100"], plan.Efficiency(), plan.Workload()
B8, B70 = plan.BASES["8B"], plan.BASES["70B"]
TINY = plan.Base(layers=3, width=32, heads=4, kv_heads=2, mlp=48, vocabulary=64)


def network(base: plan.Base, device: str = "meta") -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=base.layers, hidden_size=base.width, num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads, intermediate_size=base.mlp, vocab_size=base.vocabulary,
        tie_word_embeddings=base.tied, attn_implementation="eager",
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(("base", "published"), [(B8, 8.03e9), (B70, 70.6e9)])
def test_parameters_are_those_that_the_models_state(base: plan.Base, published: float) -> None:
    assert plan.parameters(base) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_network(tied: bool) -> None:
    base = replace(TINY, tied=tied)
    assert plan.parameters(base) == sum(p.numel() for p in network(base).parameters())


def test_operations_are_those_that_the_benchmark_counts() -> None:
    """Of a forward pass in which every token sees all, and of the gradient of what goes in, weights frozen."""
    tokens, model = 5, network(TINY, "cpu").requires_grad_(False)
    states = torch.zeros(1, tokens, TINY.width, requires_grad=True)
    products = Products(lambda: part)
    with products:
        part = "forward"
        logits = model(inputs_embeds=states, use_cache=False).logits
        part = "backward"
        torch.autograd.grad(logits.sum(), states)
    linear_maps = plan.product_flops(TINY, tokens, TINY.layers) + plan.head_flops(TINY, tokens)
    attention = plan.attention_flops(TINY, tokens, TINY.layers, tokens)
    counted = {
        name: operations({name: [[*key, n] for key, n in found.items()]}) for name, found in products.found.items()
    }
    assert counted["forward"] == linear_maps + attention
    assert counted["backward"] == linear_maps + 2 * attention


def test_an_adapter_has_a_and_b_of_every_linear_map() -> None:
    work = replace(STEP, rank=5, gated=False)
    maps = [m for m in network(TINY).model.modules() if isinstance(m, torch.nn.Linear)]
    assert plan.adapter_parameters(TINY, work) == sum(5 * (m.in_features + m.out_features) for m in maps)
    gated = replace(work, gated=True, objectives=3)
    assert plan.adapter_parameters(TINY, gated) == 4 * plan.adapter_parameters(TINY, work)
    assert plan.adapter_parameters(TINY, replace(work, lora_layers=1)) * 3 == plan.adapter_parameters(TINY, work)
    assert plan.adapter_file(TINY, work) == 4 * plan.adapter_parameters(TINY, work)
    assert plan.adapter_slots(TINY, replace(work, rank=60, versions=3)) == 2 * 3 * plan.adapter_parameters(
        TINY, replace(work, rank=64)
    )


def test_a_prompt_is_computed_once() -> None:
    """By hand: P = 100, T = 10, two responses, of which the last token is not read."""
    work = replace(STEP, prompt_tokens=100, response_tokens=10)
    assert plan.prompt_places(work, 0) == 100 + 2 * 9
    assert plan.prompt_places(work, 1) == 2 * (100 + 2 * 9)  # the gate makes every token another one
    text = replace(work, gated=False)
    assert plan.PREFERENCE_TEXT == TEXT
    assert plan.prompt_places(text, 1) == 100 + TEXT + 4 * 9
    assert plan.prompt_places(replace(text, anchors=1), 1) == 100 + TEXT + 3 * 9
    assert plan.compared(replace(work, responses=8, objectives=3)) == 6


def test_what_the_parts_of_a_step_are_made_of() -> None:
    work = replace(STEP, checkpointing=False)
    parts = plan.trainer_flops(B8, work)
    assert parts["policy forward"] / parts["reference"] == pytest.approx(2, rel=0.1)  # w- beside w+, and the adapter
    assert parts["policy backward"] > parts["policy forward"]
    again = plan.trainer_flops(B8, STEP)
    assert again["policy backward"] > parts["policy backward"] + 0.9 * parts["policy forward"]
    half = plan.trainer_flops(B8, replace(work, lora_layers=16))
    assert half["reference"] == parts["reference"]
    assert half["policy forward"] < 0.55 * parts["policy forward"]  # the lower layers are those of the reference
    text = plan.trainer_flops(B8, replace(work, gated=False, lora_layers=16))
    assert text["policy forward"] > text["policy backward"]  # those are not shared, but nothing goes back to them
    assert text["reference"] > parts["reference"]


def test_times_scale_as_they_should() -> None:
    seconds = plan.trainer_seconds(B8, STEP, H100, USUAL, 8, False)
    twice = plan.trainer_seconds(B8, replace(STEP, prompts=128), H100, USUAL, 8, False)
    faster = plan.trainer_seconds(B8, STEP, replace(H100, flops=2 * H100.flops), USUAL, 8, False)
    for part in ("reference", "policy forward", "policy backward"):
        assert twice[part] == pytest.approx(2 * seconds[part])
        assert faster[part] == pytest.approx(seconds[part] / 2)
    assert twice["exchange"] == seconds["exchange"]
    # 65 prompts on 64 GPUs take as long as 128
    assert plan.trainer_seconds(B8, replace(STEP, prompts=65), H100, USUAL, 64, False) == plan.trainer_seconds(
        B8, replace(STEP, prompts=128), H100, USUAL, 64, False
    )
    few, many = (plan.decode_step_seconds(B8, H100, USUAL, 1, n, 300) for n in (1, 32))
    assert many < 1.5 * few  # reading the weights binds
    bound = [plan.decode_step_seconds(B8, H100, replace(USUAL, decode_overhead=0), 1, n, 0) for n in (1000, 2000)]
    assert bound[1] == pytest.approx(2 * bound[0])  # multiplying by them does
    assert plan.prefill_seconds(B8, H100, USUAL, 4, 1000) == pytest.approx(
        plan.prefill_seconds(B8, H100, USUAL, 1, 1000) / 4
    )


def test_a_pass_of_a_sharded_base_takes_as_long_as_to_gather_it() -> None:
    slow = replace(H100, network=1e9)
    seconds = plan.trainer_seconds(B70, replace(STEP, prompts=16), slow, USUAL, 16, True)
    assert seconds["reference"] == pytest.approx(2 * plan.parameters(B70) * 15 / 16 / 1e9)
    assert plan.trainer_seconds(B70, STEP, replace(H100, network=1e30), USUAL, 16, True) == pytest.approx(
        plan.trainer_seconds(B70, STEP, replace(H100, network=1e30), USUAL, 16, False)
    )


def test_sampling_goes_in_waves_of_what_fits() -> None:
    room = plan.concurrent_sequences(B8, STEP, H100, USUAL, 1)
    assert room == STEP.max_sequences
    small = replace(H100, memory=22e9)
    fitting = plan.concurrent_sequences(B8, STEP, small, USUAL, 1)
    used = plan.server_memory(B8, STEP, small, USUAL, 1, 10**6)
    each = plan.kv_bytes(B8) * (STEP.prompt_tokens + STEP.response_tokens)
    assert sum(used.values()) <= 0.9 * 22e9 < sum(used.values()) + each
    one, two = (
        plan.sampling_seconds(B8, replace(STEP, prompts=count * fitting, responses=2), small, USUAL, 2, 1)
        for count in (1, 2)
    )
    assert two == pytest.approx(2 * one)
    assert plan.concurrent_sequences(B70, STEP, H100, USUAL, 1) == 0
    assert plan.sampling_seconds(B70, STEP, H100, USUAL, 1, 1) == float("inf")


def test_a_measured_rate_replaces_the_formula() -> None:
    seconds = plan.sampling_seconds(B8, STEP, H100, USUAL, 4, 1, tokens_per_s=1000.0)
    assert seconds == 64 / 4 * 2 * 128 / 1000


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("base", "gpus"), [(B8, 8), (B8, 13), (B70, 40)])
def test_the_best_split_is_that_of_a_plain_search(base: plan.Base, gpus: int, stale: bool) -> None:
    work, least = replace(STEP, prompts=8 * gpus), float("inf")
    for size in (1, 2, 4, 8):
        for servers in range(1, gpus):
            trainers = gpus - servers * size
            if trainers < 1 or plan.concurrent_sequences(base, work, H100, USUAL, size) == 0:
                continue
            for sharded in (False, True):
                held = sum(plan.trainer_memory(base, work, 20e9, trainers, sharded).values())
                if held > 0.92 * 80e9:
                    continue
                sampling = plan.sampling_seconds(base, work, H100, USUAL, servers, size)
                sampling += plan.adapter_file(base, work) / 2e9
                training = sum(plan.trainer_seconds(base, work, H100, USUAL, trainers, sharded).values())
                least = min(least, max(sampling, training) if stale else sampling + training)
                break
    found = plan.best_split(base, work, H100, USUAL, 20e9, gpus, stale)
    assert found is not None
    assert found.seconds(stale) == pytest.approx(least)
    assert found.servers * found.tensor_parallel + found.trainers == gpus
    assert found.overlapped <= found.one_after_the_other


def test_who_waits() -> None:
    split = plan.Split(1, 1, 1, False, 3.0, 1.0, {"reference": 2.0, "policy": 4.0})
    assert split.one_after_the_other == 10
    assert split.waiting(stale=False) == pytest.approx((0.6, 0.4))
    assert split.overlapped == 6
    assert split.waiting(stale=True) == pytest.approx((1 / 3, 0))
    assert plan.prompts_per_hour(64, 10.0) == 23_040


def test_a_base_that_fits_nowhere_has_no_split() -> None:
    assert plan.best_split(B70, STEP, H100, USUAL, 20e9, 8, True) is None
    why = plan.why_not(B70, STEP, H100, USUAL, 20e9, 8, plan.TENSOR_PARALLEL)
    held = sum(plan.trainer_memory(B70, STEP, 20e9, 4, True).values())
    assert why == f"does not fit: each of 4 trainers would hold {held / 1e9:.0f} GB, of 74"
    assert plan.why_not(B70, STEP, H100, USUAL, 20e9, 8, [1]) == "does not fit: no server holds the base and a sequence"


def test_traffic() -> None:
    """One gated adapter for every server, or one file for every preference."""
    one, each = plan.adapter_traffic(B8, STEP, 4)
    assert one == 4 * plan.adapter_file(B8, STEP)
    assert each == 64 * plan.adapter_file(B8, STEP)
    assert plan.adapter_traffic(B8, replace(STEP, preferences=5), 4)[1] == 5 * plan.adapter_file(B8, STEP)


def test_published_figures_that_the_defaults_were_fitted_to() -> None:
    for figure in plan.PUBLISHED:
        ratio = plan.published_rate(figure, USUAL) / figure.tokens_per_s
        assert 0.9 < ratio < 1.1 if figure.fitted else 1 < ratio < 3  # what the page says of them


def test_a_base_of_a_config(tmp_path: Path) -> None:
    model = network(TINY)
    model.config.save_pretrained(tmp_path)
    assert plan.base_of(str(tmp_path)) == plan.base_of(str(tmp_path / "config.json")) == TINY
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(UserError, match=r"^expected num_hidden_layers, .* in '.*', got none of 'num_hidden_layers'$"):
        plan.base_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"got no JSON object$"):
        plan.base_of(str(tmp_path))


def test_units_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    """The data sheet of an H100 by hand gives what its name gives."""
    common = ["--base", "8B", "--gpus", "8", "--activations_gb", "6"]
    assert plan.main(common) == 0
    usual = capsys.readouterr().out
    assert (
        plan.main(
            [
                *common,
                "--tflops",
                "989",
                "--bandwidth_tb_per_s",
                "3.35",
                "--memory_gb",
                "80",
                "--network_gb_per_s",
                "50",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == usual
    assert plan.main([*common, "--server_tokens_per_s", "1e9"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| 8B | 8 | 0 |")]
    assert line.split(" | ")[6] == "0.00"


@pytest.mark.slow
def test_activations_are_those_of_the_memory_plan() -> None:
    work = replace(STEP, rank=2, prompt_tokens=24, response_tokens=12, micro_batch=128)
    assert 0 < plan.planned_activations(TINY, work) < plan.planned_activations(TINY, replace(work, checkpointing=False))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--base", "9B"], "expected 8B, 70B or a config.json as a base, got '9B'"),
        (["--gpu", "H1"], "expected --gpu H100, H200, A100, got 'H1'"),
        (["--gpus", "1"], "expected --gpus from 2 on, got 1"),
        (["--rank", "0"], "expected --rank from 1 on, got 0"),
        (["--training_mfu", "1.5"], "expected --training_mfu to be a share, above 0 and at most 1, got 1.5"),
        (["--server_tokens_per_s", "nan"], "expected --server_tokens_per_s to be positive, got nan"),
        (["--anchors", "3"], "expected --anchors 1 or 2, got 3"),
        (["--lora_layers", "33", "--base", "8B"], "expected --lora_layers up to 32 of 8B, got 33"),
        (["--rank", "512"], "expected rank blocks of 512 in all, vLLM's highest, got 1536"),
        (["--activations_gb", "6"], "expected --activations_gb for each of 2 bases, got 1"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 2
    assert capsys.readouterr().err == f"cluster_plan: error: {sentence}\n"


def test_whole_prompts_go_to_a_trainer() -> None:
    """By hand: the operations of a prompt over the rate, times the prompts of the fullest GPU."""
    seconds = plan.trainer_seconds(B8, STEP, H100, USUAL, 7, False)
    one = plan.trainer_flops(B8, STEP)["policy forward"] / (989e12 * 0.35)
    assert seconds["policy forward"] == pytest.approx(ceil(64 / 7) * one)
    shares = [plan.trainer_seconds(B8, STEP, H100, USUAL, n, False)["policy forward"] for n in range(1, 65)]
    assert all(later <= earlier for earlier, later in pairwise(shares))
