"""Algorithm 1, steps 1 to 3, as functions: prompts become responses with pairwise feedback, or a scored evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter

import torch
from torch import Tensor

from miepo.errors import UserError
from miepo.exploration import Exploration, draw_anchors
from miepo.feedback import Feedback, feedback_counts, pairwise_feedback
from miepo.objectives import Objective
from miepo.objectives.base import take_failures
from miepo.objectives.scoring import normalise_rewards, start_scoring
from miepo.policy import Policy
from miepo.policy.trunk import Trunk
from miepo.preferences import DirichletPreferences, PreferenceSampler, draw_preferences, routing_draws
from miepo.rollout import RolloutEngine, TransformersEngine
from miepo.router import ExpectationRouter, Router
from miepo.seeding import RandomStream, torch_seeds
from miepo.types import EvaluationBatch, PreferenceBatch, PromptBatch, Responses, read_under

PAIR = 2  # responses to a prompt in Algorithm 1: the pair that every objective judges

# calls a function on every process, and raises on all of them what it raises on one
Together = Callable[[Callable[[], Tensor]], Tensor]


def alone(function: Callable[[], Tensor]) -> Tensor:
    """Call ``function``: there is one process."""
    return function()


@dataclass(frozen=True)
class RolloutSettings:
    """How preference vectors are drawn, and responses sampled and judged.

    Attributes:
        preferences: Distribution of w+ and w-.
        engine: What samples.
        max_new_tokens: A response is cut after this many tokens (paper: 128).
        responses: Sampled for each prompt, ``n`` (paper: 2).
        missing_eos_penalty: Taken off the normalised rewards by which pairs are made where a response was cut.
        feedback: ``per_objective``, the paper's, or ``scalarised``.
        seed: Fixes every draw, as a function of the place in the run.

    Raises:
        UserError: a setting is out of its range.
    """

    preferences: PreferenceSampler = field(default_factory=DirichletPreferences)
    engine: RolloutEngine = field(default_factory=TransformersEngine)
    max_new_tokens: int = 128
    responses: int = PAIR
    missing_eos_penalty: float = 0.0
    feedback: Feedback = "per_objective"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"data.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.responses < PAIR:
            raise UserError(f"a pair takes two responses: data.responses must be at least 2, got {self.responses}")
        if not 0 <= self.missing_eos_penalty < inf:
            raise UserError(f"data.missing_eos_penalty must not be negative, got {self.missing_eos_penalty}")

    def most_compared(self, objectives: int) -> int:
        """Return how many responses to a prompt occur in pairs at most."""
        pairs = 1 if self.responses == PAIR or self.feedback == "scalarised" else objectives
        return min(self.responses, 2 * pairs)


@dataclass(frozen=True)
class Learner:
    """What a rollout needs to know of the method that learns from it.

    Attributes:
        policy: Samples, and is the reference with its adapter off.
        objectives: ``K``, in column order, normalised.
        router: Says which objectives are asked about a prompt.
        exploration: Says how many w- are drawn and what the term reads under them; without it none is drawn.
    """

    policy: Policy
    objectives: Sequence[Objective]
    router: Router = field(default_factory=ExpectationRouter)
    exploration: Exploration | None = None


@dataclass(frozen=True)
class BegunRollout:
    """A rollout whose responses are being sampled.

    Attributes:
        prompts: ``B`` prompts and their places in the run.
        preference: w+, ``(B, K)``.
        counterfactual: w-, ``(B, C, K)``.
        step: Optimiser steps that the policy had taken when sampling began.
        responses: Waits for the responses.
        seconds: That it took to begin, which is the sampling where the engine computes in this process.
    """

    prompts: PromptBatch
    preference: Tensor
    counterfactual: Tensor
    step: int
    responses: Callable[[], Responses]
    seconds: float = 0.0


def roll_out(
    prompts: PromptBatch, learner: Learner, settings: RolloutSettings, together: Together = alone
) -> PreferenceBatch:
    """Draw preferences, sample responses under w+, let the objectives judge them, and ask the reference.

    Args:
        prompts: ``B`` prompts and their places in the run.
        learner: The method that learns from the rollout.
        settings: How to sample and judge.
        together: Calls the scoring on all processes of a run.
    """
    return finish_rollout(begin_rollout(prompts, learner, settings), learner, settings, together)


def begin_rollout(
    prompts: PromptBatch,
    learner: Learner,
    settings: RolloutSettings,
    step: int = 0,
    known: Responses | None = None,
) -> BegunRollout:
    """Draw preferences and begin to sample responses under w+.

    Args:
        prompts: ``B`` prompts and their places in the run.
        learner: The method that learns from the rollout.
        settings: How to sample.
        step: Optimiser steps that the policy has taken.
        known: The responses, where they were sampled before a run was stopped.
    """
    exploration, places = learner.exploration, (prompts.epochs, prompts.positions)
    preference, counterfactual = draw_preferences(
        settings.preferences, settings.seed, *places,
        exploration.num_counterfactuals if exploration else 0, len(learner.objectives),
    )  # fmt: skip
    if known is not None:
        known = known.to(learner.policy.device)
        return BegunRollout(prompts, preference, counterfactual, step, lambda: known)
    start = perf_counter()
    seeds = torch_seeds(RandomStream.SAMPLING, settings.seed, *places)
    waiting = settings.engine.begin(
        learner.policy, prompts.prompts, preference, settings.responses, settings.max_new_tokens, seeds
    )
    return BegunRollout(prompts, preference, counterfactual, step, waiting, perf_counter() - start)


def finish_rollout(
    begun: BegunRollout,
    learner: Learner,
    settings: RolloutSettings,
    together: Together = alone,
    step: int = 0,
    sampled: Callable[[], None] = lambda: None,
) -> PreferenceBatch:
    """Wait for the responses, let the objectives judge them, and ask the reference.

    Args:
        begun: From :func:`begin_rollout`.
        learner: The method that learns from the rollout.
        settings: How to judge.
        together: Calls the scoring on all processes of a run.
        step: Optimiser steps that the policy has taken by now.
        sampled: Called once the responses are there.
    """
    policy, objectives, exploration = learner.policy, learner.objectives, learner.exploration
    prompts, preference, counterfactual = begun.prompts, begun.preference, begun.counterfactual
    device, seed, places = policy.device, settings.seed, (prompts.epochs, prompts.positions)
    routing = learner.router.route(preference, routing_draws(seed, *places))  # (B, K)

    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = perf_counter() - begun.seconds
    responses = begun.responses()
    came = perf_counter()
    sampled()
    # an objective of weight 0 is not asked, unless the exploration term wants to know what it would say
    every = exploration is not None and exploration.needs_feedback
    asked = torch.ones_like(routing, dtype=torch.bool) if every else routing > 0
    scored = start_scoring(objectives, prompts.prompts, responses.texts, asked)

    def refer(compared: Tensor) -> tuple[Tensor, Trunk | None, Tensor, Tensor]:
        anchors = draw_anchors(exploration.anchors if exploration else 2, compared, seed, *places)  # (B, n)
        trunk = policy.trunk(prompts.prompts, responses.tokens, compared)
        found = reference_log_prob(
            policy, prompts.prompts, preference, counterfactual, responses, compared, anchors, trunk
        )
        synchronise()  # so that the time below is that of the work and not of its launch
        return anchors, trunk, *found

    # of two responses both are compared, whatever their scores: the reference reads them while these are waited for
    early = refer(torch.ones(len(prompts), PAIR, dtype=torch.bool)) if settings.responses == PAIR else None
    referred = perf_counter()
    scores = normalise_rewards(objectives, together(scored))  # (B, n, K)
    empty, cut = responses.empty.cpu(), ~responses.finished.cpu()
    judged = scores - settings.missing_eos_penalty * cut.unsqueeze(-1) if settings.missing_eos_penalty else scores
    feedback = pairwise_feedback(judged, empty, routing, counterfactual, settings.feedback)
    judging = perf_counter() - referred  # what was left of it
    anchors, trunk, reference, counterfactual_reference = early or refer(feedback.compared)
    return PreferenceBatch(
        prompts=prompts.prompts,
        preference=preference.to(device),
        counterfactual=counterfactual.to(device),
        compared=feedback.compared.to(device),
        anchors=anchors.to(device),
        routing=routing.to(device),
        responses=responses,
        scores=scores.to(device),
        pairs=feedback.pairs.to(device),
        labels=feedback.labels.to(device),
        counterfactual_labels=feedback.counterfactual_labels.to(device),
        cross_labels=feedback.cross_labels.to(device),
        reference_log_prob=reference,
        counterfactual_reference_log_prob=counterfactual_reference,
        trunk=trunk,
        staleness=step - begun.step if settings.engine.samples_elsewhere else None,
        max_gap=settings.engine.max_gap if step == begun.step else inf,
        counts=feedback_counts(feedback.labels, scores, asked, empty) | take_failures(objectives) | responses.counts,
        seconds={
            "sampling": came - start,
            "reference": perf_counter() - came - judging,
            "scoring": judging,
        },
    )


def reference_log_prob(
    policy: Policy,
    prompts: Sequence[str],
    preference: Tensor,
    counterfactual: Tensor,
    responses: Responses,
    compared: Tensor,
    anchors: Tensor,
    trunk: Trunk | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``log pi_ref`` of the compared under w+, ``(B, n, T)``, and of anchors under each w-, ``(B, n, C, T)``."""
    own, count = preference.unsqueeze(1), counterfactual.shape[1]
    read_mask = read_under(compared, anchors, count)  # (B, n, 1 + C)
    if not policy.reference_depends_on_preference:  # the adapter alone reads w
        log_prob = policy.reference_response_log_prob(prompts, own, responses.tokens, read_mask[..., :1], trunk)
        return log_prob[:, :, 0], log_prob.expand(-1, -1, count, -1)
    both = torch.cat([own, counterfactual], 1)  # (B, 1 + C, K)
    log_prob = policy.reference_response_log_prob(prompts, both, responses.tokens, read_mask)  # (B, n, 1 + C, T)
    return log_prob[:, :, 0], log_prob[:, :, 1:]


def evaluate(
    prompts: PromptBatch,
    policy: Policy,
    objectives: Sequence[Objective],
    settings: RolloutSettings,
    together: Together = alone,
) -> EvaluationBatch:
    """Sample one response to each prompt under its preference vector, and score it by ``objectives``, if any."""
    assert prompts.preference is not None and prompts.grid_index is not None
    seeds = torch_seeds(RandomStream.EVALUATION, settings.seed, prompts.positions, prompts.grid_index.tolist())
    responses = settings.engine.sample(policy, prompts.prompts, prompts.preference, 1, settings.max_new_tokens, seeds)
    scores = None
    if objectives:
        raw = together(start_scoring(objectives, prompts.prompts, responses.texts))
        scores = normalise_rewards(objectives, raw)[:, 0]
    return EvaluationBatch(
        prompts.prompts,
        prompts.positions,
        prompts.grid_index.to(policy.device),
        prompts.preference.to(policy.device),
        responses,
        scores,
    )
