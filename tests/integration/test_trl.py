"""K = 1 is DPO: TRL's own trainer, on the same model, adapter and pairs, gives the same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from miepo.losses import alignment_loss, implicit_reward, total_loss
from miepo.policy import GatedConditioning
from miepo.router import ExpectationRouter
from miepo.types import Tokens
from tests.helpers.tiny import randomise_adapter, tiny_policy

PAIRS = [
    ("the garden", " is good", " is a place to grow food"),
    ("people like", " rain in spring", " it"),
    ("when rain comes", " the garden is good", " people grow"),
]


def rows_to_tokens(rows: list[torch.Tensor], pad: int, left: bool) -> Tokens:
    width = max(map(len, rows))
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    ids = torch.full((len(rows), width), pad)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, True
    return Tokens(ids, mask)


@pytest.mark.filterwarnings("default")  # TRL's own
def test_one_objective_is_trl_dpo(tiny_base_model: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    policy = tiny_policy(tiny_base_model, [GatedConditioning(shared=False)], ["only"])
    randomise_adapter(policy)
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    trainer = DPOTrainer(
        model=str(tiny_base_model),
        args=DPOConfig(
            str(tmp_path), beta=0.3, per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
            model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False,
        ),
        train_dataset=data,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    ours = {n.removeprefix("model."): p for n, p in policy.adapter_parameters().items()}
    theirs = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])

    batch = next(iter(trainer.get_train_dataloader()))
    trl_loss = trainer.compute_loss(trainer.model, dict(batch))
    trl_loss.backward()

    ids, completion, real = batch["input_ids"], batch["completion_mask"].bool(), batch["attention_mask"].bool()
    pad = policy.tokenizer.pad_token_id
    prompts = rows_to_tokens([i[r & ~c] for i, r, c in zip(ids, real, completion, strict=True)], pad, left=True)
    responses = rows_to_tokens([i[c] for i, c in zip(ids, completion, strict=True)], pad, left=False)
    preference = torch.ones(6, 1)
    log_prob = policy.log_prob(prompts, preference, responses)
    reward = implicit_reward(log_prob, policy.reference_log_prob(prompts, responses), responses.mask)
    reward = reward.view(2, 3).T  # (B, 2): chosen, rejected
    alignment = alignment_loss(reward, torch.ones(3, 1), beta_c=0.3)
    loss = total_loss(ExpectationRouter.combine(alignment, preference[:3]), None)
    loss.backward()

    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)
