"""Scores in the prompt, and which scores a preference vector asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from miepo.errors import UserError
from miepo.policy import Conditioning
from miepo.seeding import RandomStream, generator


@cache
def score_range(draws: int = 5000) -> tuple[float, float]:
    """Return the smallest and the largest of so many standard normal draws: where targets of z-scores begin and end."""
    values = generator(RandomStream.CALIBRATION, draws).standard_normal(draws)
    return float(values.min()), float(values.max())


def preference_to_target(preference: Sequence[float], low: float, high: float) -> list[float]:
    """Return target scores ``w_i / ||w||_2 (high - low) + low``: weight 1 asks for the top, weight 0 for the bottom."""
    norm = float(np.linalg.norm(preference))
    return [w / norm * (high - low) + low for w in preference]


class TargetConditioning(Conditioning):
    """Scores in the prompt: ``<helpfulness_score> 1.3 <humor_score> -0.4`` after its text.

    Args:
        draws: Targets span what so many draws of a z-score would, see :func:`score_range`.
        bounds: The lowest and the highest target, in z-scores, instead: for scores that are far from normal.
    """

    def __init__(self, draws: int = 5000, bounds: tuple[float, float] | None = None) -> None:
        if draws < 2:
            raise UserError(f"TargetConditioning.draws must be at least 2, got {draws}")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise UserError(f"TargetConditioning.bounds must be the lowest and the highest target, got {bounds}")
        self.bounds = score_range(draws) if bounds is None else bounds

    def write(self, preference: Sequence[float], names: Sequence[str]) -> str:
        return self.write_scores(preference_to_target(preference, *self.bounds), names)

    def write_scores(self, scores: Sequence[float], names: Sequence[str]) -> str:
        """Return scores as RiC writes them behind a prompt: ``' <NAME_score> 1.2'`` for each objective."""
        # + 0.0 so that -0.04 reads 0.0 and not -0.0
        return "".join(f" <{n}_score> {round(s, 1) + 0.0:.1f}" for n, s in zip(names, scores, strict=True))

    def markers(self, names: Sequence[str]) -> list[str]:
        return [f"<{name}_score>" for name in names]
