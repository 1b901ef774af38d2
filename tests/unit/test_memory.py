"""The memory plan against what really is alive, on models small enough to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miepo import MIEPO, OnlinePreferenceDataModule
from miepo.exploration import InfoNCE
from miepo.objectives import ScoreModel
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import fused_decoder
from miepo.types import Tokens
from tests.helpers.fit import rollout
from tests.helpers.tiny import Length, Letters, save_tiny_model, save_tiny_scorer
from tools import memory

P, T, BATCH = 24, 12, 3


def module_of(folder: Path, beta_w: float = 0.01, **settings: Any) -> MIEPO:
    usual = {"conditioning": [PromptConditioning(), GatedConditioning()], "lora_rank": 2, "dtype": "bfloat16"}
    policy = Policy(str(folder), lora_alpha=4, **(usual | settings))
    return MIEPO(policy, exploration=InfoNCE(beta_w))


def plan_of(module: MIEPO, objectives: list[Any] | None = None) -> memory.Plan:
    data = OnlinePreferenceDataModule(["a prompt"], batch_size=BATCH, max_new_tokens=T)
    return memory.plan_memory(module, data, objectives or [Letters("a"), Letters("b")], P, T, cuda=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("conditioning", [PromptConditioning, GatedConditioning])
@pytest.mark.parametrize("beta_w", [0.01, 0.0])
def test_the_plan_is_what_a_training_step_takes(
    model: Path, tmp_path: Path, conditioning: type[Any], beta_w: float, checkpointing: bool
) -> None:
    """Of three prompts of the same length with the longest responses that there may be."""
    settings = {"conditioning": [conditioning()], "gradient_checkpointing": checkpointing}
    module, batch, _ = rollout(
        model, tmp_path, conditioning=settings["conditioning"], module={"exploration": InfoNCE(beta_w)},
        policy={"gradient_checkpointing": checkpointing, "dtype": "bfloat16", "lora_dropout": 0.05},
        data={"batch_size": BATCH, "max_new_tokens": T, "prompts": ["the garden"] * BATCH},
    )  # fmt: skip
    ids = torch.randint(5, 30, (BATCH, 2, T), generator=torch.Generator().manual_seed(0))
    whole = replace(batch.responses, tokens=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    zeros = torch.zeros(BATCH, 2, batch.counterfactual.shape[1], T)
    batch = replace(
        batch, responses=whole, reference_log_prob=torch.zeros(BATCH, 2, T), counterfactual_reference_log_prob=zeros
    )
    longest = int(module.policy.encode(batch.prompts, batch.preference).mask.sum(-1).max())
    for parameter in module.policy.adapter_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    module.log_terms = lambda *_: None
    real = memory.peak_of(lambda: module.training_step(batch, 0)["loss"].backward())
    data = OnlinePreferenceDataModule(["a prompt"], batch_size=BATCH, max_new_tokens=T)
    objectives = [Letters("e"), Length()]
    plan = memory.plan_memory(module_of(model, beta_w, **settings), data, objectives, longest, T, cuda=False)
    assert plan.phases["training step"] == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_what_is_alive(model: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    plan = plan_of(module_of(model, gradient_checkpointing=checkpointing))
    module = module_of(model, gradient_checkpointing=checkpointing)
    policy = module.policy.build(["letter_a", "letter_b"])
    adapter = sum(p.nbytes for p in policy.adapter_parameters().values())
    assert plan.resident["adapter"] == plan.resident["gradients"] == plan.resident["Adam"] / 2 == adapter
    assert plan.resident["base model"] == sum(p.nbytes for p in policy.parameters()) - adapter

    monkeypatch.setattr(fused_decoder, "_packed", memory._in_order)  # whichever of them this CPU takes
    monkeypatch.setattr(fused_decoder, "_laid_out", memory._in_place)
    real = memory.peak_of(lambda: memory._decode(policy, BATCH, 2, P, T))
    assert plan.phases["sampling"] == pytest.approx(real, rel=0.02)


def test_the_plan_has_the_copy_of_the_weights_that_sampling_reads(tmp_path: Path) -> None:
    """Of a base that was published in bfloat16, where the CPU computes in float32."""
    folder = save_tiny_model(tmp_path / "model")
    plain = plan_of(module_of(folder, dtype="float32"))
    assert "weights for sampling" not in plain.resident
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    plan = plan_of(module_of(folder, dtype="float32"))
    layers = [m.weight.numel() for m in network.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert plan.resident["weights for sampling"] == 2 * (sum(layers) + network.lm_head.weight.numel())
    assert plan.phases["sampling"] < plain.phases["sampling"]  # which has a copy in oneDNN's order
    assert "weights for sampling" not in plan_of(module_of(folder)).resident  # which computes in bfloat16

    policy = module_of(folder, dtype="float32").policy.build(["letter_a", "letter_b"])
    if fused_decoder.holds_in_half([policy.causal_lm.get_output_embeddings().weight]):
        memory._decode(policy, BATCH, 2, P, T)  # which makes the copy
        real = memory.peak_of(lambda: memory._decode(policy, BATCH, 2, P, T))
        assert plan.phases["sampling"] == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_the_plan_follows_the_settings(model: Path) -> None:
    plain = plan_of(module_of(model)).phases["training step"]
    assert plan_of(module_of(model, beta_w=0)).phases["training step"] < 0.7 * plain
    assert plan_of(module_of(model, gradient_checkpointing=True)).phases["training step"] < 0.7 * plain


def test_reward_models_stay_or_come_one_at_a_time(model: Path, tmp_path: Path) -> None:
    scorer = str(save_tiny_scorer(tmp_path / "scorer"))

    def objectives(**settings: Any) -> list[Any]:
        return [ScoreModel(scorer, name, dtype="float32", max_length=40, **settings) for name in ("a", "b")]

    staying, coming = plan_of(module_of(model), objectives()), plan_of(module_of(model), objectives(offload=True))
    elsewhere = plan_of(module_of(model), objectives(device="cuda:1"))
    size = staying.resident["reward model a"]
    assert size == staying.resident["reward model b"] > 0
    assert "reward model a" not in coming.resident
    assert coming.phases["scoring a"] == staying.phases["scoring a"] + size
    assert "scoring a" not in elsewhere.phases


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
objectives:
  - class_path: miepo.objectives.Brevity
model:
  policy: {{class_path: miepo.policy.Policy, init_args: {{base: {model}, lora_rank: 2}}}}
data: {{prompts: [hello], batch_size: 2, max_new_tokens: 8}}
trainer: {{accelerator: cpu, logger: false}}
"""
    )
    arguments = ["--config", str(config), "--prompt_tokens", "16"]
    assert memory.main([*arguments, "--card", "40"]) == 0
    printed = capsys.readouterr().out
    assert "Prompts of 16 tokens, responses of 8" in printed
    assert "network unknown: brevity" in printed
    assert "Card of 40 GB: fits" in printed
    assert memory.main([*arguments, "--card", "0.00001"]) == 1
    assert "does not fit" in capsys.readouterr().out

    for wrong, said in {
        ("--prompt_tokens", "0"): "--prompt_tokens must be positive, got 0",
        ("--model.policy.init_args.base", str(tmp_path / "none")): "there is none",
    }.items():
        assert memory.main(["--config", str(config), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_measured(model: Path, tmp_path: Path) -> None:
    """Two real steps see the lengths that are planned for."""
    from miepo.cli.trainer import MiepoCLI

    cli = MiepoCLI(
        run=False,
        save_config_callback=None,
        args=[
            f"--model.policy.init_args={{base: {model}, lora_rank: 2}}", "--model.policy.class_path=miepo.policy.Policy",
            "--objectives=[{class_path: tests.helpers.tiny.Length}]", "--data.prompts=[a, b b b b, c]",
            "--data.validation_prompts=[d]", "--data.batch_size=2", "--data.max_new_tokens=8", "--data.normalise_on=2",
            "--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
        ],
    )  # fmt: skip
    _, watch = memory.measure(cli)
    policy = cli.model.policy
    longest = policy.encode(["b b b b"], torch.ones(1, 1)).ids.shape[-1]
    assert (watch.prompt_tokens, watch.response_tokens) == (longest, 8)
