"""Cheerful responses, by the VADER lexicon."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from miepo.errors import needs
from miepo.objectives.base import Objective

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")


def analyzer(name: str) -> Any:
    """Return VADER, for the objective of this name."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise needs("vaderSentiment", f"objective {name}") from None
    return SentimentIntensityAnalyzer()


class Cheerfulness(Objective):
    """Positive sentiment by the VADER lexicon, in [-1, 1] (package ``vaderSentiment``).

    Args:
        by_sentence: The mean over sentences, as VADER's authors advise for longer texts. Of the whole text the score
            grows with the number of cheerful words, so that it pays for length.
        name: See :class:`~miepo.objectives.base.Objective`.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def __init__(
        self, by_sentence: bool = False, name: str | None = None, normalisation: dict[str, float] | None = None
    ) -> None:
        super().__init__(name, normalisation)
        self.by_sentence = by_sentence

    def load(self, device: torch.device) -> None:
        self.analyzer = analyzer(self.name)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self._sentiment(response) for response in responses]

    def _sentiment(self, text: str) -> float:
        parts = [part for part in SENTENCE.findall(text) if part.strip(" .!?\n")] if self.by_sentence else [text]
        return sum(self.analyzer.polarity_scores(part)["compound"] for part in parts) / max(len(parts), 1)


class CheerfulWords(Objective):
    """How many different words of a response the VADER lexicon rates as positive (package ``vaderSentiment``).

    Unlike :class:`Cheerfulness`, which a single word nearly exhausts, it goes on rising, and repetition does not pay.
    What a negation makes of a word is not seen.

    Args:
        name: See :class:`~miepo.objectives.base.Objective`.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def load(self, device: torch.device) -> None:
        self.positive = {word for word, valence in analyzer(self.name).lexicon.items() if valence > 0}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(len(self.positive.intersection(WORD.findall(text.lower())))) for text in responses]
