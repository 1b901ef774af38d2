from __future__ import annotations

from collections.abc import Sequence

import torch

from miepo.errors import needs
from miepo.objectives.base import Objective


class Cheerfulness(Objective):
    """Positive sentiment by the VADER lexicon, in [-1, 1] (package ``vaderSentiment``)."""

    def load(self, device: torch.device) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise needs("vaderSentiment", f"objective {self.name}") from None
        self.analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self.analyzer.polarity_scores(response)["compound"] for response in responses]
