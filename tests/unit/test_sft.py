"""Supervised fine-tuning: response-only loss, batches of like length, and a merged model that is the next reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer

from miepo.data.datasets import SafeRLHF
from miepo.data.datasets.safe_rlhf import TEMPLATE
from miepo.errors import UserError
from miepo.losses import supervised_loss
from miepo.methods import SupervisedDataModule, SupervisedFineTuning
from miepo.methods.sft.data import length_batches
from miepo.policy import PromptConditioning
from miepo.policy.base_model import load_base
from miepo.policy.policy import Policy
from tests.helpers.data import safe_rlhf_rows, write_rows
from tests.helpers.tiny import randomise_adapter, tiny_policy

PROMPTS, RESPONSES = ["the garden", "rain"], ["people like it", "food"]


def plain_policy(folder: Path, **kwargs) -> Policy:
    return Policy(
        str(folder), [], **{"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "template": TEMPLATE} | kwargs
    )


def fit(folder: Path, tmp_path: Path, steps: int = 30, **kwargs) -> SupervisedFineTuning:
    seed_everything(0, verbose=False)
    data = SupervisedDataModule(
        SafeRLHF(write_rows(tmp_path / "data.jsonl", safe_rlhf_rows(40)), train=32, test=8), batch_size=8
    )
    module = SupervisedFineTuning(plain_policy(folder, **kwargs), learning_rate=1e-2, warmup=0.1)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.validate(module, data, verbose=False)
    before = trainer.callback_metrics["validation/loss"].item()
    trainer.fit(module, data)
    assert trainer.callback_metrics["validation/loss"].item() < before - 0.3
    return module


def encoded(policy: Policy) -> tuple:
    prompts = policy.encode_text(PROMPTS, ["", ""])
    ids = [policy.template.encode_response(p, "", r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(map(len, ids))
    tokens = type(prompts)(
        torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids]),
    )
    return prompts, tokens


def test_the_merged_model_is_the_reference_of_the_online_stage(tiny_base_model: Path, tmp_path: Path) -> None:
    tuned = fit(tiny_base_model, tmp_path).policy.eval()
    merged = tmp_path / "merged"
    prompts, tokens = encoded(tuned)
    expected = tuned.log_prob(prompts, torch.zeros(2, 0), tokens)
    assert (expected - tuned.reference_log_prob(prompts, tokens)).abs().max() > 0.1  # something was learnt

    model = AutoModelForCausalLM.from_pretrained(merged)  # plain transformers reads it
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("the garden")["input_ids"]])
    with torch.no_grad(), tuned.autocast():
        torch.testing.assert_close(model(ids).logits, tuned.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (
        model.generation_config.to_diff_dict()
        == AutoModelForCausalLM.from_pretrained(tiny_base_model).generation_config.to_diff_dict()
    )

    online = tiny_policy(merged, [PromptConditioning()], template=TEMPLATE)
    torch.testing.assert_close(
        online.reference_log_prob(online.encode_text(PROMPTS, ["", ""]), tokens), expected, rtol=1e-4, atol=1e-4
    )


def test_rounding_of_the_update_is_measured(tiny_base_model: Path, tmp_path: Path) -> None:
    policy = randomise_adapter(plain_policy(tiny_base_model, dtype="float32").build(()), scale=0.1)
    assert policy.save_merged(tmp_path / "whole") == pytest.approx(1.0, abs=1e-4)
    small = randomise_adapter(plain_policy(tiny_base_model, dtype="bfloat16").build(()), scale=1e-3)
    assert abs(small.save_merged(tmp_path / "rounded") - 1) > 0.02  # far below the spacing of bfloat16


def untrained(
    folder: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> tuple[SupervisedFineTuning, SupervisedDataModule]:
    """A module and its data, two rows a batch, set up for steps that a test takes by hand."""
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = SupervisedDataModule(file, file, batch_size=2)
    module = SupervisedFineTuning(plain_policy(folder, dtype="float32"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
                      max_steps=0, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data)
    module.log = lambda *_, **__: None  # outside of a loop there is nowhere to log to
    return module, data


def test_the_loss_is_that_of_the_response_alone(tiny_base_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    module, data = untrained(tiny_base_model, tmp_path, rows)
    batch = next(iter(data.train_dataloader()))
    policy = module.policy
    end = policy.tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(tiny_base_model)
    nats, count = 0.0, 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        text = TEMPLATE.format(prompt=prompt, preference="", response="")
        given = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [*policy.tokenizer(text + response, add_special_tokens=False)["input_ids"], end]
        assert whole[: len(given)] == given
        labels = torch.tensor([[-100] * len(given) + whole[len(given) :]])
        kept = len(whole) - len(given)
        with torch.no_grad():
            nats += kept * model(torch.tensor([whole]), labels=labels).loss.item()
        count += kept
    assert int(batch.responses.mask.sum()) == count
    log_prob = module._log_prob(batch)
    assert supervised_loss(log_prob, batch.responses.mask).item() == pytest.approx(nats / count, rel=1e-5)
    assert data.tokens_per_batch == count
    assert module.training_step(batch, 0)["loss"].item() == pytest.approx(nats / count, rel=1e-5)


def test_the_loss_of_batches_of_unequal_length_is_that_over_all_tokens(tiny_base_model: Path, tmp_path: Path) -> None:
    """A step over a batch of few tokens weighs less: the mean over batches is the mean over the epoch's tokens."""
    rows = [
        {"prompt": f"{p} {i}", "response": r}
        for i in range(2)
        for p, r in (("rain", "food"), ("rain", "people like it " * 9))
    ]
    module, data = untrained(tiny_base_model, tmp_path, rows)
    batches = list(data.train_dataloader())
    counts = [int(batch.responses.mask.sum()) for batch in batches]
    assert max(counts) > 5 * min(counts)
    assert data.tokens_per_batch == sum(counts) / 2
    losses = [module.training_step(batch, i)["loss"].item() for i, batch in enumerate(batches)]
    nats = [-module._log_prob(batch)[batch.responses.mask].sum().item() for batch in batches]
    assert sum(losses) / 2 == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert losses[0] / losses[1] == pytest.approx(nats[0] / nats[1], rel=1e-5)


def test_batches_are_of_like_length_seeded_and_whole() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 1003).tolist()
    batches = length_batches(lengths, 8, np.random.default_rng(1))
    assert sorted(i for b in batches for i in b) == list(range(1003))
    assert batches == length_batches(lengths, 8, np.random.default_rng(1))
    assert batches != length_batches(lengths, 8, np.random.default_rng(2))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    plain = sum(8 * max(lengths[i : i + 8]) for i in range(0, 1003, 8))
    assert padded < 1.05 * sum(lengths) < plain


def test_mistakes(tiny_base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a policy without conditioning .*, got PromptConditioning"):
        SupervisedFineTuning(Policy(str(tiny_base_model)))
    adapter = tmp_path / "adapter"
    plain_policy(tiny_base_model).build(()).model.save_pretrained(adapter)
    with pytest.raises(UserError, match="an adapter that was not merged"):
        load_base(str(adapter), "auto")
    inside = tmp_path / "inside"  # saved from within the wrapper: a model folder by its looks
    plain_policy(tiny_base_model).build(()).model.base_model.model.save_pretrained(inside)
    AutoTokenizer.from_pretrained(tiny_base_model).save_pretrained(inside)
    with pytest.raises(UserError, match="an adapter that was not merged"):
        load_base(str(inside), "auto")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"expected an empty folder for the merged model.*set model.save_to"):
        fit(tiny_base_model, tmp_path)


def test_a_prompt_is_trained_on_or_evaluated_on(
    tiny_base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Five prompts with four responses each: the responses of a prompt stay together."""
    rows = [{"prompt": f"food {i % 5}", "response": f"rain {i}"} for i in range(20)]
    data = SupervisedDataModule(examples=write_rows(tmp_path / "examples.jsonl", rows))
    with caplog.at_level("INFO"):
        data.setup("fit")
    parts = [{prompt for prompt, _ in part} for part in (data.train_set, data.validation_set)]
    assert [len(part) for part in parts] == [4, 1]
    assert not parts[0] & parts[1]
    assert "12 of 16 training prompts repeat another one" in caplog.text


def test_what_is_too_long_is_said_of_its_part(tiny_base_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "short.jsonl", [{"prompt": "food", "response": "rain"}])
    write_rows(tmp_path / "long.jsonl", [{"prompt": "food " * 50, "response": "rain"}])
    data = SupervisedDataModule(
        examples=str(tmp_path / "short.jsonl"), validation_examples=str(tmp_path / "long.jsonl"), max_tokens=30
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(UserError, match="no validation example of 1 has at most 30 tokens"):
        trainer.validate(SupervisedFineTuning(plain_policy(tiny_base_model)), data, verbose=False)
