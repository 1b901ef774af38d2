"""The exploration term: what keeps responses under different preferences distinguishable, I(Y; W | X) of Eq. 6.

Each formulation is a pure function of log-probabilities and a thin class with its settings. All of them vanish at
weight 0, where MI-EPO is MO-ODPO exactly. ``configs/studies/README.md`` compares them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from miepo.errors import UserError
from miepo.feedback import extremes, of_pairs
from miepo.losses import alignment_loss
from miepo.metrics.information import infonce_bound
from miepo.recorded import Recorded
from miepo.seeding import RandomStream, generator


@dataclass(frozen=True)
class ExplorationInputs:
    """Responses under the preference they were sampled with and under counterfactual ones."""

    preference: Tensor  # (B, K) w+
    counterfactual: Tensor  # (B, C, K) w-
    log_prob: Tensor  # (B, n) of the whole response under w+, without dropout and gradient
    counterfactual_log_prob: Tensor  # (B, n, C) under each w-, alike
    reward: Tensor  # (B, n) implicit reward under w+
    counterfactual_reward: Tensor  # (B, n, C) under each w-
    lengths: Tensor  # (B, n) response tokens
    pairs: Tensor  # (B, Q, 2) the responses that are compared
    labels: Tensor  # (B, K) feedback of each objective on its pair
    counterfactual_labels: Tensor  # (B, C, K) feedback as it would be under each w-
    cross_labels: Tensor  # (B, Q, K) feedback of every objective on every pair
    anchors: Tensor  # (B, n) True where a response may be learnt from: it was read under w- and is not empty
    beta_c: float  # scale of the alignment logits


# -- functions ---------------------------------------------------------------------------------------------------------


def draw_anchors(count: int, compared: Tensor, seed: int, epochs: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Return which of the compared responses are read under w-, too: all, or with ``count`` 1 any, equally likely.

    The term of one of them, drawn at random, has the mean over all as its expectation, and so has its gradient.

    Args:
        count: 1, or 2 for all.
        compared: ``(B, n)`` bool.
        seed: Of the draw, which is a function of it and of the place in the run.
        epochs: Epoch of each prompt.
        positions: Index of each prompt in its epoch.

    Returns:
        ``(B, n)`` bool.
    """
    if count == 2:
        return compared.clone()
    anchors = torch.zeros_like(compared)
    for row, (epoch, position) in enumerate(zip(epochs, positions, strict=True)):
        if found := compared[row].nonzero().flatten().tolist():
            anchors[
                row, found[-1 - int(generator(RandomStream.ANCHOR, seed, epoch, position).integers(len(found)))]
            ] = True
    return anchors


def infonce_loss(reward: Tensor, counterfactual_reward: Tensor, beta_w: float) -> Tensor:
    """Return Eq. 12: InfoNCE between the sampling preference w+ and counterfactual preferences w-.

    With one w- it is ``-log sigmoid(beta_w r(x, w+, y) - beta_w r(x, w-, y))``; with more, the InfoNCE cross-entropy
    over ``1 + C`` candidates. The anchor logit carries a stop-gradient (Section on Eq. 13), so the gradient reaches
    the policy through w- alone.

    Args:
        reward: ``(B, n)`` implicit rewards under w+.
        counterfactual_reward: ``(B, n, C)`` implicit rewards of the same responses under each w-.
        beta_w: Scale of the exploration logits.

    Returns:
        ``(B, n)``.
    """
    anchor = beta_w * reward.detach().unsqueeze(-1)  # (B, n, 1)
    logits = torch.cat([torch.zeros_like(anchor), beta_w * counterfactual_reward - anchor], -1)  # (B, n, 1 + C)
    return torch.logsumexp(logits, -1)


def information_labels(information: Tensor) -> Tensor:
    """Return +1 where the first response tells more about w+ than the second, -1 where less; ``(B, 2) -> (B,)``.

    0 where they differ by less than 0.001 nats, which is rounding.

    What a response tells is its pointwise information ``log pi(y|x,w+) - log mean_j pi(y|x,w_j)`` over w+ and the
    counterfactual preferences (:func:`~miepo.metrics.infonce_bound`). It is the reward whose score-function gradient is
    that of I(Y; W | X).
    """
    difference = information[:, 0] - information[:, 1]
    return torch.where(difference.abs() < 1e-3, 0.0, torch.sign(difference))


def matching_loss(
    reward: Tensor,
    counterfactual_reward: Tensor,
    preference: Tensor,
    counterfactual: Tensor,
    labels: Tensor,
    counterfactual_labels: Tensor,
    beta: float,
) -> Tensor:
    """Say which response belongs to which preference: a contrast over pairs instead of over single responses.

    Under a preference w the feedback favours the first response by ``v(w) = sum_k w_k c_k`` with labels ``c_k``. Where
    ``g = 1/2 (v(w+) - v(w-))`` is positive, the first response is w+'s and the second w-'s. The loss is
    ``-|g| log sigmoid(sign(g) beta ((r(w+, y1) - r(w+, y2)) - (r(w-, y1) - r(w-, y2))))``: the logit is the difference
    of the two responses' InfoNCE logits, so whatever both have in common, length included, cancels, and making a
    response unlikely everywhere gains nothing. Pairs on which all objectives agree, and of scalarised feedback those
    that both preferences order alike, say nothing about w (``g = 0``).

    Args:
        reward: ``(B, 2)`` implicit rewards of a pair under w+.
        counterfactual_reward: ``(B, 2, C)`` under each w-.
        preference: ``(B, K)`` w+.
        counterfactual: ``(B, C, K)`` w-.
        labels: ``(B, K)``.
        counterfactual_labels: ``(B, C, K)`` the labels under w-: the same where each objective has its own, others
            where they order the scalarised reward.
        beta: Scale of the logits.

    Returns:
        ``(B, C)``.
    """
    value = (preference * labels).sum(-1, keepdim=True)  # (B, 1)
    gap = (value - (counterfactual * counterfactual_labels).sum(-1)) / 2  # (B, C) in [-1, 1]
    gap = torch.where(gap.abs() < 1e-6, 0.0, gap)  # rounding of sums that are equal
    margin = (reward[:, 0] - reward[:, 1]).unsqueeze(-1) - (counterfactual_reward[:, 0] - counterfactual_reward[:, 1])
    return torch.where(gap == 0, 0.0, -gap.abs() * F.logsigmoid(beta * torch.sign(gap) * margin))


def counterfactual_alignment(contrast: ExplorationInputs) -> Tensor:
    """Return Eq. 8 under every w-, routed by it, ``(B,)`` the mean over the w-.

    The pairs count once more, for other preferences.
    """
    rewards = of_pairs(contrast.counterfactual_reward, contrast.pairs)  # (B, Q, 2, C)
    losses = [
        alignment_loss(rewards[..., j], contrast.counterfactual_labels[:, j], contrast.beta_c)
        for j in range(contrast.counterfactual.shape[1])
    ]  # C of (B, K)
    return (torch.stack(losses, 1) * contrast.counterfactual).sum(-1).mean(-1)


# -- formulations ------------------------------------------------------------------------------------------------------


class Exploration(Recorded, ABC):
    """A formulation of the exploration term.

    Args:
        weight: Factor of the term in the loss; with 0 it is not computed, which is MO-ODPO.
        num_counterfactuals: Preference vectors w- per prompt.
    """

    needs_gradient = True  # of the log-probabilities under w-
    needs_feedback = False  # of every objective on every pair
    reads_information = False  # learns from the values of log-probabilities, which must be those without dropout
    anchors = 2  # compared responses that are read under w-: all of them, or with 1 one

    def __init__(self, weight: float = 1.0, num_counterfactuals: int = 1) -> None:
        name = type(self).__name__
        if not 0 <= weight < inf:
            raise UserError(f"the weight of {name} must not be negative, got {weight}")
        if num_counterfactuals < 1:
            raise UserError(f"{name}.num_counterfactuals must be at least 1, got {num_counterfactuals}")
        self.weight, self.num_counterfactuals = weight, num_counterfactuals

    @property
    def active(self) -> bool:
        """Whether the term is computed."""
        return self.weight > 0

    @abstractmethod
    def loss(self, contrast: ExplorationInputs) -> Tensor:
        """Return the term of each prompt before its weight, ``(B,)``."""

    def __call__(self, contrast: ExplorationInputs, progress: float) -> Tensor:
        """Return the weighted term ``(B,)``.

        ``progress`` is the share of all steps that are done, for a subclass whose weight changes with it.
        """
        return self.weight * self.loss(contrast)


class InfoNCE(Exploration):
    """The paper's L_YW (Eq. 12 and 13): ``1/2 sum_y -log sigmoid(beta_w r(x,w+,y) - beta_w r(x,w-,y))``.

    Args:
        beta_w: Scale of the exploration logits (paper: 0.01). With 0 the term is not computed: that is MO-ODPO.
        num_counterfactuals: Preference vectors w- per prompt (paper: 1). More give the full InfoNCE bound.
        anchors: 2 as in the paper, or 1: one of the compared responses, drawn at random, stands for all. The same
            gradient in expectation with half of the work under w-, or less, and more noise.
    """

    def __init__(self, beta_w: float = 0.01, num_counterfactuals: int = 1, anchors: int = 2) -> None:
        if not 0 <= beta_w < inf:
            raise UserError(f"beta_w must not be negative, got {beta_w}")
        if anchors not in (1, 2):
            raise UserError(f"InfoNCE.anchors must be 1 or 2, got {anchors}")
        super().__init__(1.0, num_counterfactuals)
        self.beta_w, self.anchors = beta_w, anchors

    @property
    def active(self) -> bool:
        return self.beta_w > 0

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        loss = infonce_loss(contrast.reward, contrast.counterfactual_reward, self.beta_w)  # (B, n)
        # the mean over the anchors, an empty one among two counting as 0
        return torch.where(contrast.anchors, loss, 0.0).sum(-1) / contrast.anchors.sum(-1).clamp(min=self.anchors)


class PairwiseInformation(Exploration):
    """Pointwise information as one more judge: of two responses the one that tells more about w+ is preferred.

    A DPO loss (Eq. 8) with ``beta_c`` and the labels of :func:`information_labels`: the score-function gradient of
    I(Y; W | X) turned into a preference. The passes under w- need no gradient.

    Args:
        weight: Factor of the loss.
        num_counterfactuals: Fresh preference vectors that, with w+, make up the mixture.
    """

    needs_gradient = False
    reads_information = True

    def __init__(self, weight: float = 1.0, num_counterfactuals: int = 4) -> None:
        super().__init__(weight, num_counterfactuals)

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        information = infonce_bound(contrast.log_prob.detach(), contrast.counterfactual_log_prob.detach())  # (B, n)
        pairs = extremes(information, contrast.anchors).unsqueeze(1)  # (B, 1, 2)
        labels = information_labels(of_pairs(information, pairs).squeeze(1))  # (B,)
        labels = labels * of_pairs(contrast.anchors, pairs).all(-1).squeeze(1)
        return alignment_loss(of_pairs(contrast.reward, pairs), labels.unsqueeze(-1), contrast.beta_c).squeeze(-1)


class Matching(Exploration):
    """Which of two responses belongs to which of two preferences (:func:`matching_loss`), averaged over the w-.

    Args:
        weight: Factor of the loss.
        reuse: Factor, within the term, of the alignment loss under w- (:func:`counterfactual_alignment`), which the
            pass under w- makes free.
        beta: Scale of the logits; ``beta_c`` by default.
        num_counterfactuals: Preference vectors w- per prompt.
    """

    needs_feedback = True

    def __init__(
        self,
        weight: float = 0.5,
        reuse: float = 1.0,
        beta: float | None = None,
        num_counterfactuals: int = 1,
    ) -> None:
        if beta is not None and not 0 < beta < inf:
            raise UserError(f"Matching.beta must be positive, got {beta}")
        super().__init__(weight, num_counterfactuals)
        if not 0 <= reuse < inf:
            raise UserError(f"Matching.reuse must not be negative, got {reuse}")
        self.beta, self.reuse = beta, reuse

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        beta = contrast.beta_c if self.beta is None else self.beta
        own, other = (of_pairs(r, contrast.pairs) for r in (contrast.reward, contrast.counterfactual_reward))
        losses, counterfactual_labels = [], contrast.counterfactual_labels
        for q, labels in enumerate(contrast.cross_labels.unbind(1)):
            if contrast.pairs.shape[1] > 1:  # each objective's pair, which w- does not order in another way
                counterfactual_labels = labels.unsqueeze(1).expand_as(counterfactual_labels)
            weights = contrast.preference, contrast.counterfactual
            losses.append(matching_loss(own[:, q], other[:, q], *weights, labels, counterfactual_labels, beta).mean(-1))
        matching = torch.stack(losses).mean(0)
        return matching + self.reuse * counterfactual_alignment(contrast) if self.reuse else matching


class CounterfactualAlignment(Exploration):
    """No information term but its control: the same pair and feedback, learnt from under w-, too (Eq. 8 routed by w-).

    What a formulation gains over this it gains by contrasting preferences, and not by reading each pair twice.
    """

    needs_feedback = True

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        return counterfactual_alignment(contrast)
