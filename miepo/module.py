"""The LightningModule: the policy, the router and one gradient step of MI-EPO."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from miepo.errors import UserError
from miepo.losses import alignment_loss, exploration_loss, implicit_reward, total_loss
from miepo.metrics.information import feedback_information, infonce_bound
from miepo.objectives import Objective
from miepo.objectives.base import objectives_of
from miepo.policy import Policy
from miepo.router import ExpectationRouter, Router
from miepo.types import EvaluationBatch, PreferenceBatch, Tokens

SCHEMA = 1


class MIEPO(LightningModule):
    """Multi-Objective Exploration and Preference Optimization via Mutual Information (arXiv 2607.01392).

    Args:
        policy: The preference-conditioned policy.
        router: How the alignment losses of the objectives are summed; the exact expectation by default.
        beta_c: Scale of the alignment logits (paper: 0.1).
        beta_w: Scale of the exploration logits (paper: 0.01). With 0 the term is not computed: that is MO-ODPO.
        num_counterfactuals: Preference vectors w- per prompt (paper: 1). More give the full InfoNCE bound.
        learning_rate: Peak rate of Adam (paper: 1e-4 for safe alignment, 4e-5 for the helpful assistant).
        warmup: Fraction of all steps in which the rate rises, before it falls as a cosine to 0 (paper: 0.1).
    """

    def __init__(
        self,
        policy: Policy,
        router: Router | None = None,
        beta_c: float = 0.1,
        beta_w: float = 0.01,
        num_counterfactuals: int = 1,
        learning_rate: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (("beta_c", beta_c, 0), ("beta_w", beta_w, 0), ("learning_rate", learning_rate, 0)):
            if value < least:
                raise UserError(f"{name} must not be negative, got {value}")
        if num_counterfactuals < 1:
            raise UserError(f"num_counterfactuals must be at least 1, got {num_counterfactuals}")
        if not 0 <= warmup < 1:
            raise UserError(f"warmup is a fraction of all steps, at least 0 and below 1, got {warmup}")
        self.policy = policy
        self.router = router or ExpectationRouter()
        self.beta_c, self.beta_w = beta_c, beta_w
        self.num_counterfactuals = num_counterfactuals if beta_w > 0 else 0
        self.learning_rate, self.warmup = learning_rate, warmup
        self.objectives: list[Objective] = []
        self.metrics = nn.ModuleDict()  # filled by callbacks, so that metrics move and reduce with the module
        self.strict_loading = False  # checkpoints hold the adapter only; on_load_checkpoint checks that it is whole

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives, in column order."""
        return tuple(o.name for o in self.objectives)

    def setup(self, stage: str) -> None:
        self.objectives = objectives_of(self.trainer)
        if self.trainer.precision != "32-true":
            raise UserError(
                "the policy sets its own precision (policy.dtype), so that sampling and training agree: "
                f"expected trainer.precision 32-true, got {self.trainer.precision}"
            )

    def configure_model(self) -> None:
        self.policy.build(self.names)

    # -- the step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> STEP_OUTPUT:
        """Eq. 13 on one rollout; the flow chart of the method."""
        mask = batch.responses.tokens.mask  # (B, 2, T)
        log_prob = self.log_prob(batch, batch.preference.unsqueeze(1)).squeeze(2)  # (B, 2, T)
        reward = implicit_reward(log_prob, batch.reference_log_prob, mask)  # (B, 2)
        alignment = alignment_loss(reward, batch.labels, self.beta_c)  # (B, K), Eq. 8
        routed = self.router.combine(alignment, batch.routing)  # (B,)

        exploration = bound = None
        if self.beta_w > 0:
            counterfactual_log_prob = self.log_prob(batch, batch.counterfactual)  # (B, 2, C, T)
            counterfactual_reward = implicit_reward(
                counterfactual_log_prob, batch.counterfactual_reference_log_prob, mask.unsqueeze(2)
            )  # (B, 2, C)
            exploration = exploration_loss(reward, counterfactual_reward, self.beta_w)  # (B, 2), Eq. 12
            bound = infonce_bound(log_prob.detach().sum(-1), counterfactual_log_prob.detach().sum(-1))  # (B, 2)

        loss = total_loss(routed, exploration, anchors=~batch.responses.empty)  # Eq. 13
        self._log_step(batch, loss, reward.detach(), alignment.detach(), exploration, bound)
        return {"loss": loss, "feedback_information": feedback_information(alignment.detach(), batch.labels)}

    def log_prob(self, batch: PreferenceBatch, preferences: Tensor) -> Tensor:
        """Token log-probabilities of both responses under ``C`` preferences each, ``(B, C, K) -> (B, 2, C, T)``."""
        return response_log_prob(self.policy, batch.prompts, preferences, batch.responses.tokens)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """The responses are sampled and scored when they come here; callbacks measure them."""

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`."""

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row per answer: prompt, preference by objective name, response."""
        return [
            {"prompt": prompt, "preference": dict(zip(self.names, weights, strict=True)), "response": texts[0]}
            for prompt, weights, texts in zip(
                batch.prompts, batch.preference.double().round(decimals=6).tolist(), batch.responses.texts, strict=True
            )
        ]

    def _log_step(
        self,
        batch: PreferenceBatch,
        loss: Tensor,
        reward: Tensor,
        alignment: Tensor,
        exploration: Tensor | None,
        bound: Tensor | None,
    ) -> None:
        lengths = batch.responses.tokens.mask.sum(-1).float()  # (B, 2)
        values = {
            # on the policy's own samples the mean implicit reward estimates KL(policy || reference)
            "kl": reward.mean(),
            "response/tokens": lengths.mean(),
            "response/finished": batch.responses.finished.float().mean(),
        }
        labelled = batch.labels != 0
        agrees = torch.where(labelled, (torch.sign(reward[:, :1] - reward[:, 1:]) == batch.labels).float(), torch.nan)
        for k, name in enumerate(self.names):
            values[f"reward/{name}"] = batch.scores[..., k].nanmean()
            values[f"alignment/{name}"] = torch.where(labelled[:, k], alignment[:, k], torch.nan).nanmean()
            values[f"agreement/{name}"] = agrees[:, k].nanmean()
        if exploration is not None and bound is not None:
            values |= {
                "exploration": exploration.detach()[~batch.responses.empty].mean(),
                "information/infonce": bound.mean(),
            }
        values |= {f"count/{key}": torch.tensor(float(value)) for key, value in batch.counts.items()}
        size = len(batch)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict({k: v for k, v in values.items() if not v.isnan()}, batch_size=size)
        self.log("learning_rate", self.lr_schedulers().get_last_lr()[0], batch_size=size)  # type: ignore[union-attr]

    # -- optimisation and checkpoints ----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Adam with a linear warm-up and a cosine decay to 0 (Tables 3 and 4)."""
        optimizer = torch.optim.Adam(self.policy.adapter_parameters().values(), lr=self.learning_rate)
        if self.trainer.estimated_stepping_batches == float("inf"):
            raise UserError(
                "the schedule needs the number of steps: expected trainer.max_epochs or max_steps, got none"
            )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the adapter and drops the base weights."""
        keep = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["miepo"] = {"schema": SCHEMA, "objectives": list(self.names), "base": self.policy.base}
        checkpoint["miepo"]["policy"] = self.policy.settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other objectives or another adapter; restores the normalisation for evaluation."""
        saved = checkpoint.get("miepo")
        if saved is None:
            raise UserError("expected a checkpoint written by miepo, got one without its entry")
        if saved["schema"] > SCHEMA:
            raise UserError(f"expected a checkpoint of schema {SCHEMA} or older, got {saved['schema']}: update miepo")
        if saved["objectives"] != list(self.names):
            raise UserError(
                f"the checkpoint was trained on the objectives {saved['objectives']}, in this order; "
                f"the config lists {list(self.names)}"
            )
        now = self.policy.settings()
        if changed := [key for key, value in saved["policy"].items() if now.get(key) != value]:
            both = "; ".join(f"{key} {saved['policy'][key]} and not {now.get(key)}" for key in changed)
            raise UserError(f"the checkpoint's policy has {both}: set the configuration's policy alike")
        if saved["base"] != self.policy.base:
            rank_zero_warn(
                f"the adapter was trained on the base '{saved['base']}', the config has '{self.policy.base}'"
            )
        expected = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        came = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if wrong := sorted(name for name in expected.keys() | came.keys() if expected.get(name) != came.get(name)):
            name = wrong[0]
            raise UserError(
                f"the checkpoint's adapter does not fit the policy: {len(wrong)} of {len(expected)} weights differ, "
                f"first {name}: expected shape {_shape(expected.get(name))}, got {_shape(came.get(name))}"
            )
        for objective in self.objectives:  # Lightning restores callbacks for fit alone
            objective.load_state_dict(checkpoint.get("callbacks", {}).get(objective.state_key, {}))


def response_log_prob(policy: Policy, prompts: Any, preferences: Tensor, responses: Tokens) -> Tensor:
    """Token log-probabilities of ``n`` responses per prompt under ``C`` preferences per prompt.

    Args:
        policy: The policy.
        prompts: ``B`` prompts.
        preferences: ``(B, C, K)``.
        responses: ``(B, n, T)``.

    Returns:
        ``(B, n, C, T)``.
    """
    (b, c, _), n = preferences.shape, responses.ids.shape[1]
    flat_prompts = [prompt for prompt in prompts for _ in range(c)]
    tokens = policy.encode(flat_prompts, preferences.flatten(0, 1)).repeat(n)  # (B C n, P)
    each = Tokens(*(x.unsqueeze(1).expand(-1, c, -1, -1).flatten(0, 2) for x in (responses.ids, responses.mask)))
    log_prob = policy.log_prob(tokens, preferences.flatten(0, 1).repeat_interleave(n, 0), each)
    return log_prob.view(b, c, n, -1).transpose(1, 2)


def _shape(shape: torch.Size | None) -> str:
    return "no such weight" if shape is None else str(tuple(shape))
