"""The LightningModule: the policy, the router and one gradient step of MI-EPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from miepo.data.rollout import Learner
from miepo.errors import UserError
from miepo.exploration import Exploration, ExplorationInputs, InfoNCE
from miepo.feedback import of_pairs
from miepo.losses import alignment_loss, implicit_reward, mean_distance, total_loss
from miepo.methods.base import PolicyModule
from miepo.methods.micro_batches import in_micro_batches
from miepo.metrics.information import feedback_information, infonce_bound
from miepo.policy import Policy
from miepo.recorded import Recorded
from miepo.router import ExpectationRouter, Router, SampleRouter
from miepo.training.reporting import grid_of
from miepo.types import PreferenceBatch


@dataclass(frozen=True)
class StepStatistics:
    """What the loss of each prompt is made of, without gradient."""

    reward: Tensor  # (B, n) implicit, under w+; NaN where a response is not compared
    margin: Tensor  # (B, K) of the implicit rewards of each objective's pair
    alignment: Tensor  # (B, K)
    exploration: Tensor | None  # (B,)
    bound: Tensor | None  # (B, n) of the information between preference and response, in nats; NaN if no anchor
    logprob_drift: Tensor | None  # (B, n) mean distance from the engine's log-probabilities, in nats per token

    @classmethod
    def of(
        cls,
        batch: PreferenceBatch,
        known: Tensor,
        reward: Tensor,
        alignment: Tensor,
        exploration: Tensor | None,
        contrast: ExplorationInputs | None,
    ) -> StepStatistics:
        """Make one of the step's tensors.

        ``known`` are the log-probabilities under w+ without dropout, ``(B, n, T)``.
        """
        bound = drift = None
        if contrast is not None:
            bound = infonce_bound(contrast.log_prob, contrast.counterfactual_log_prob)
            bound = torch.where(batch.anchors, bound, torch.nan)
        if batch.responses.log_prob is not None:
            drift = mean_distance(known, batch.responses.log_prob, batch.responses.tokens.mask)
            drift = torch.where(batch.compared, drift, torch.nan)
        exploration = None if exploration is None else exploration.detach()
        compared = of_pairs(reward.detach(), batch.pairs)  # (B, Q, 2)
        margin = (compared[..., 0] - compared[..., 1]).expand(batch.labels.shape)
        reward = torch.where(batch.compared, reward.detach(), torch.nan)
        return cls(reward, margin, alignment.detach(), exploration, bound, drift)

    @classmethod
    def join(cls, parts: Sequence[StepStatistics]) -> StepStatistics:
        """Return the statistics of all micro-batches of a step, in their order."""
        columns: list[list[Any]] = [[getattr(part, f.name) for part in parts] for f in fields(cls)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return cls(*joined)


class MIEPO(PolicyModule):
    """Multi-Objective Exploration and Preference Optimization via Mutual Information (arXiv 2607.01392).

    Args:
        policy: The preference-conditioned policy.
        router: How the alignment losses of the objectives are summed; the exact expectation by default.
        beta_c: Scale of the alignment logits (paper: 0.1).
        exploration: The exploration term; by default the paper's, :class:`~miepo.exploration.InfoNCE`. With weight 0
            (``beta_w: 0``) it is not computed: that is MO-ODPO.
        learning_rate: Peak rate of Adam (paper: 1e-4 for safe alignment, 4e-5 for the helpful assistant).
        warmup: Fraction of all steps in which the rate rises, before it falls as a cosine to 0 (paper: 0.1).
    """

    def __init__(
        self,
        policy: Policy,
        router: Router | None = None,
        beta_c: float = 0.1,
        exploration: Exploration | None = None,
        learning_rate: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(policy, learning_rate, warmup)
        if not 0 <= beta_c < inf:
            raise UserError(f"beta_c must not be negative, got {beta_c}")
        self.router = router or ExpectationRouter()
        self.beta_c = beta_c
        self.exploration = exploration or InfoNCE()
        if self.exploration.active and self.exploration.needs_feedback and isinstance(self.router, SampleRouter):
            name = type(self.exploration).__name__
            raise UserError(f"{name} needs the feedback of all objectives on every pair: SampleRouter asks one only")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        own = isinstance(self.trainer.datamodule, Recorded)  # type: ignore[attr-defined]
        if stage in ("validate", "test") or (stage == "fit" and own):  # a user's own data may be for training alone
            grid_of(self.trainer, self)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> STEP_OUTPUT:
        """Learn from one rollout: :meth:`terms` of a few prompts at a time, each with its gradient."""
        if not isinstance(batch, PreferenceBatch):
            raise UserError(f"MIEPO learns from rollouts: expected batches PreferenceBatch, got {type(batch).__name__}")
        groups = self.policy.micro_batches(batch.prompts, batch.preferences, batch.responses.tokens, batch.read_under)
        loss, statistics = in_micro_batches(
            self.terms, [batch[group] for group in groups], list(self.policy.adapter_parameters().values())
        )
        terms = StepStatistics.join(statistics)
        self.log_terms(batch, loss, terms)
        return {"loss": loss, "feedback_information": feedback_information(terms.margin, batch.labels, self.beta_c)}

    @property
    def exploring(self) -> bool:
        """Whether the exploration term is computed: one objective has one preference, and nothing to explore."""
        return self.exploration.active and len(self.names) > 1

    @property
    def logged(self) -> bool:
        """Whether the loggers see the figures of this step."""
        trainer: Any = self.trainer
        return (trainer.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0

    @property
    def learner(self) -> Learner:
        """What a rollout needs to know of this method."""
        return Learner(self.policy, self.objectives, self.router, self.exploration if self.exploring else None)

    def terms(self, batch: PreferenceBatch) -> tuple[Tensor, StepStatistics]:
        """Return Eq. 13, averaged over the prompts, and what it is made of; the flow chart of the method."""
        mask = batch.responses.tokens.mask  # (B, n, T)
        log_prob, counterfactual = self.log_prob(batch)  # (B, n, T), (B, n, C, T)
        reward = implicit_reward(log_prob, batch.reference_log_prob, mask)  # (B, n)
        alignment = self.alignment(batch, reward)  # (B, K), Eq. 8
        routed = self.router.combine(alignment, batch.routing)  # (B,)

        known = self.without_dropout(batch, log_prob, counterfactual)
        exploration = contrast = None
        if self.exploring:
            contrast = self.contrast(batch, counterfactual, reward, known)
            exploration = self.exploration(contrast, self.progress)  # (B,), Eq. 12

        loss = total_loss(routed, exploration)  # Eq. 13
        return loss, StepStatistics.of(batch, known[0], reward, alignment, exploration, contrast)

    def alignment(self, batch: PreferenceBatch, reward: Tensor) -> Tensor:
        """Return the loss of each objective ``(B, K)``, Eq. 8, before the router; a subclass may have another.

        ``reward`` ``(B, n)`` are the implicit rewards under w+, with gradient.
        """
        return alignment_loss(of_pairs(reward, batch.pairs), batch.labels, self.beta_c)

    def log_prob(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return token log-probabilities.

        Those of compared responses are under w+, ``(B, n, T)``; of anchors also under w-, ``(B, n, C, T)``.
        """
        read, tokens, read_mask = self.policy.response_log_prob, batch.responses.tokens, batch.read_under
        trunk = batch.trunk
        if self.exploration.needs_gradient:
            both = read(batch.prompts, batch.preferences, tokens, read_mask, trunk)  # (B, n, 1 + C, T)
            return both[:, :, 0], both[:, :, 1:]
        with self.policy.evaluating():
            counterfactual = read(batch.prompts, batch.counterfactual, tokens, read_mask[..., 1:], trunk)
        own = read(batch.prompts, batch.preference.unsqueeze(1), tokens, read_mask[..., :1], trunk)
        return own.squeeze(2), counterfactual

    def without_dropout(
        self, batch: PreferenceBatch, log_prob: Tensor, counterfactual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what :meth:`log_prob` gives, as the policy samples: labels and bounds of the information are of that.

        Another pass, where the network has dropout, and where they are learnt from or this step is logged.
        """
        asked = self.exploring and (self.exploration.reads_information or self.logged)
        asked |= batch.responses.log_prob is not None and self.logged
        if not asked or not self.policy.drops_out:
            return log_prob.detach(), counterfactual.detach()
        with self.policy.evaluating():
            found = self.policy.response_log_prob(
                batch.prompts, batch.preferences, batch.responses.tokens, batch.read_under, batch.trunk
            )
        return found[:, :, 0], found[:, :, 1:]

    def contrast(
        self,
        batch: PreferenceBatch,
        counterfactual: Tensor,
        reward: Tensor,
        known: tuple[Tensor, Tensor],
    ) -> ExplorationInputs:
        """Return responses under w+ ``(B, n)``, beside the same under every w- ``(B, n, C, T)``.

        ``known`` are log-probabilities without dropout.
        """
        mask = batch.responses.tokens.mask  # (B, n, T)
        return ExplorationInputs(
            batch.preference,
            batch.counterfactual,
            known[0].sum(-1),
            known[1].sum(-1),
            reward,
            implicit_reward(counterfactual, batch.counterfactual_reference_log_prob, mask.unsqueeze(2)),
            mask.sum(-1),
            batch.pairs,
            batch.labels,
            batch.counterfactual_labels,
            batch.cross_labels,
            anchors=batch.anchors & ~batch.responses.empty,
            beta_c=self.beta_c,
        )

    def log_terms(self, batch: PreferenceBatch, loss: Tensor, terms: StepStatistics) -> None:
        """Log the terms of a step by objective."""
        values = {
            # on the policy's own samples the mean implicit reward estimates KL(policy || reference); of more than two
            # it is of those that were chosen for a pair
            "kl": terms.reward,
        }
        labelled = batch.labels != 0
        # 1 where the policy orders a pair as the objective does, 0 where the other way round, 1/2 where not at all
        agrees = torch.where(labelled, (1 + torch.sign(terms.margin) * batch.labels) / 2, torch.nan)
        for k, name in enumerate(self.names):
            values[f"alignment/{name}"] = torch.where(labelled[:, k], terms.alignment[:, k], torch.nan)
            values[f"agreement/{name}"] = agrees[:, k]
        if terms.exploration is not None and terms.bound is not None:
            values |= {"exploration": terms.exploration, "information/infonce": terms.bound}
        if terms.logprob_drift is not None:
            values["rollout/gap"] = terms.logprob_drift
        if batch.staleness is not None:
            values["rollout/staleness"] = torch.tensor(float(batch.staleness))
        means = self.log_step(batch, loss, values)
        if self.logged and "rollout/gap" in means and means["rollout/gap"] > batch.max_gap:
            raise UserError(
                f"the engine's log-probabilities are {float(means['rollout/gap']):.3g} nats a token from the policy's: "
                f"expected at most {batch.max_gap:g} (data.engine.max_gap)"
            )
