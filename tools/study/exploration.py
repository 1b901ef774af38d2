"""Variants of the paper's exploration term that the study of formulations compares, and that had no use.

``configs/studies/exploration.yaml`` names them; ``configs/studies/README.md`` has what they did.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from miepo.errors import UserError
from miepo.exploration import ExplorationInputs, InfoNCE
from miepo.preferences import DirichletPreferences


class PerTokenInfoNCE(InfoNCE):
    """InfoNCE of implicit rewards per token, so that length alone is no signal."""

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        return super().loss(
            replace(
                contrast,
                reward=contrast.reward / contrast.lengths,
                counterfactual_reward=contrast.counterfactual_reward / contrast.lengths.unsqueeze(-1),
            )
        )


class ClippedInfoNCE(InfoNCE):
    """InfoNCE without the responses that are told apart already.

    Args:
        beta_w: See :class:`~miepo.exploration.InfoNCE`.
        clip: Drop a response whose likelihood under every w- is this many nats below that under w+.
    """

    reads_information = True

    def __init__(self, beta_w: float = 0.01, clip: float = 4.0) -> None:
        super().__init__(beta_w)
        self.clip = clip

    def loss(self, contrast: ExplorationInputs) -> Tensor:
        apart = contrast.log_prob - contrast.counterfactual_log_prob.amax(-1)  # (B, n)
        return super().loss(replace(contrast, anchors=contrast.anchors & (apart.detach() < self.clip)))


class WarmedInfoNCE(InfoNCE):
    """InfoNCE whose weight rises linearly from 0.

    Args:
        beta_w: See :class:`~miepo.exploration.InfoNCE`.
        warmup: Fraction of all steps over which it rises.

    Raises:
        UserError: ``warmup`` is no fraction.
    """

    def __init__(self, beta_w: float = 0.01, warmup: float = 0.5) -> None:
        if not 0 < warmup <= 1:
            raise UserError(f"WarmedInfoNCE.warmup is a fraction of all steps, above 0 and up to 1, got {warmup}")
        super().__init__(beta_w)
        self.warmup = warmup

    def __call__(self, contrast: ExplorationInputs, progress: float) -> Tensor:
        return min(1.0, progress / self.warmup) * super().__call__(contrast, progress)


class FartherPreferences(DirichletPreferences):
    """Dirichlet preferences, of which each w- is the farthest from w+ of several draws.

    Args:
        candidates: How many draws.
        alpha: See :class:`~miepo.preferences.DirichletPreferences`.

    Raises:
        UserError: ``candidates`` is below 1.
    """

    def __init__(self, candidates: int = 3, alpha: float | list[float] = 1.0) -> None:
        super().__init__(alpha)
        if candidates < 1:
            raise UserError(f"FartherPreferences.candidates must be at least 1, got {candidates}")
        self.candidates = candidates

    def draw(self, rng: np.random.Generator, count: int, objectives: int) -> np.ndarray:
        drawn = super().draw(rng, 1 + (count - 1) * self.candidates, objectives)
        others = drawn[1:].reshape(count - 1, self.candidates, objectives)
        farthest = np.abs(others - drawn[0]).sum(-1).argmax(-1)  # (count - 1,)
        return np.concatenate([drawn[:1], others[np.arange(count - 1), farthest]])
