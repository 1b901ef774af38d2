"""The module of Rewards-in-Context: supervised fine-tuning on responses under their scores."""

from __future__ import annotations

from math import inf

from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from miepo.errors import UserError
from miepo.losses import supervised_loss
from miepo.methods.base import PolicyModule
from miepo.methods.ric.conditioning import TargetConditioning
from miepo.methods.ric.data import RewardsInContextDataModule
from miepo.policy import Policy
from miepo.training.distributed import over_processes
from miepo.types import SupervisedBatch


class RewardsInContext(PolicyModule):
    """Supervised fine-tuning on responses under their scores.

    Args:
        policy: A policy whose one conditioning is :class:`TargetConditioning`.
        learning_rate: Rate of Adam in the offline stage, after the warm-up.
        online_learning_rate: Constant rate of the online rounds.
        warmup: Fraction of all steps in which the rate rises.
    """

    def __init__(
        self, policy: Policy, learning_rate: float = 1e-4, online_learning_rate: float = 1e-5, warmup: float = 0.0
    ) -> None:
        super().__init__(policy, learning_rate, warmup)
        if not 0 <= online_learning_rate < inf:
            raise UserError(f"online_learning_rate must not be negative, got {online_learning_rate}")
        self.online_learning_rate = online_learning_rate
        if [type(c) for c in policy.conditioning] != [TargetConditioning]:
            got = ", ".join(type(c).__name__ for c in policy.conditioning)
            raise UserError(f"RewardsInContext needs one conditioning, TargetConditioning, got {got}")
        self.conditioning: TargetConditioning = policy.conditioning[0]  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and not isinstance(data, RewardsInContextDataModule):
            raise UserError(f"RewardsInContext needs data RewardsInContextDataModule, got {type(data).__name__}")

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> STEP_OUTPUT:
        texts = [self.conditioning.write_scores(row, self.names) for row in batch.scores.tolist()]
        prompts = self.policy.encode_text(batch.prompts, texts)  # (N, P)
        log_prob = self.policy.log_prob(prompts, batch.scores, batch.responses)  # (N, T)
        rewards = {f"reward/{name}": batch.scores[:, k] for k, name in enumerate(self.names)}
        seen = {"loss": -log_prob.detach()[batch.responses.mask], **rewards}  # over tokens, over responses
        means, failed = over_processes(self.trainer.strategy, seen, self.failures())
        self.log("loss", means.pop("loss"), prog_bar=True, batch_size=len(batch))
        self.log_dict(means | failed, batch_size=len(batch))
        return {"loss": supervised_loss(log_prob, batch.responses.mask, batch.tokens)}

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Return a warm-up and a constant rate offline; a constant lower rate online."""
        warm, offline = round(self.warmup * steps), self.trainer.datamodule.plan(steps)[0]  # type: ignore[attr-defined]
        ratio = self.online_learning_rate / self.learning_rate if self.learning_rate else 0.0
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warm + 1)) if step < offline else ratio)
