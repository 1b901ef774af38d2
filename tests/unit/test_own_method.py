"""A method of a user's own, with nothing but its training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miepo import load
from miepo.callbacks import EvaluationCallback, RunCheckpoint, Steerability
from miepo.errors import UserError
from miepo.feedback import of_pairs
from miepo.losses import alignment_loss, implicit_reward
from miepo.methods.base import PolicyModule
from miepo.policy import Policy
from miepo.types import PreferenceBatch
from tests.helpers.fit import Batches, tiny_run


class Plain(PolicyModule):
    """DPO of each objective, weighted by the preference."""

    def __init__(self, network: Policy, learning_rate: float = 1e-3) -> None:
        super().__init__(network, learning_rate, warmup=0.1)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        tokens = batch.responses.tokens
        own = batch.preference.unsqueeze(1)  # (B, 1, K)
        log_prob = self.policy.response_log_prob(batch.prompts, own, tokens, batch.read_under[..., :1]).squeeze(2)
        reward = implicit_reward(log_prob, batch.reference_log_prob, tokens.mask)  # (B, n)
        alignment = alignment_loss(of_pairs(reward, batch.pairs), batch.labels, 0.1)  # (B, K)
        loss = (batch.preference * alignment).sum(-1).mean()
        self.log_step(batch, loss, {"kl": reward.detach()})
        return loss


def test_a_training_step_is_enough(tiny_base_model: Path, tmp_path: Path) -> None:
    """Its rollouts draw no w-, its log has rewards and counts, and its checkpoint serves."""
    callbacks = [batches := Batches(), RunCheckpoint()]
    trainer, module, data = tiny_run(
        tiny_base_model, tmp_path, method=Plain, trainer={"callbacks": callbacks, "enable_checkpointing": True}
    )
    trainer.fit(module, data)
    (first, second), logged = batches.batches, batches.logged[-1]
    assert (first.counterfactual.shape[1], first.anchors.all()) == (0, True)
    assert torch.equal(second.routing, second.preference)  # every objective counts by its weight
    assert {"loss", "kl", "learning_rate", "response/tokens", "reward/letter_e", "reward/length"} <= logged.keys()
    assert any(key.startswith("count/") for key in logged)
    policy = load(tmp_path, trust=True)  # whose policy the configuration names in another way than usual
    assert isinstance(policy.generate("the garden", {"length": 1.0}), str)


class Worded(EvaluationCallback):
    """Returns what is no figure."""

    def on_evaluation_end(self, trainer, module) -> dict[str, Any]:
        return {"answers/word": "most"}


class Twice(EvaluationCallback):
    """Returns a figure by another's name."""

    def on_evaluation_end(self, trainer, module) -> dict[str, Any]:
        return {"steerability/length": 3.0}


def test_a_name_is_of_one_figure(tiny_model: Path, tmp_path: Path) -> None:
    callbacks = [Steerability(), Twice()]
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"callbacks": callbacks, "limit_val_batches": 1.0})
    with pytest.raises(UserError, match="the figure steerability/length of an evaluation is returned by two callbacks"):
        trainer.validate(module, data, verbose=False)


def test_a_figure_that_is_none_is_named(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"callbacks": [Worded()], "limit_val_batches": 1.0})
    with pytest.raises(
        UserError, match="the figure answers/word of an evaluation must be a number or a tensor, got 'most'"
    ):
        trainer.validate(module, data, verbose=False)
