"""Responses without offensive language."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miepo.errors import needs
from miepo.objectives.base import Objective


class Harmlessness(Objective):
    """Minus the probability of offensive language by a trained linear classifier (package ``alt-profanity-check``)."""

    higher_is_better = False

    def load(self, device: torch.device) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError:
            raise needs("alt-profanity-check", f"objective {self.name}") from None
        self.predict = predict_prob

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(p) for p in self.predict(list(responses))]
