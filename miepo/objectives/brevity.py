from __future__ import annotations

from collections.abc import Sequence

from miepo.errors import UserError
from miepo.objectives.base import Objective


class Brevity(Objective):
    """Few words, with a floor: minus the distance from ``words`` words, so that silence is not the optimum.

    Args:
        words: The ideal length.
        name: See :class:`~miepo.objectives.base.Objective`.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def __init__(self, words: int = 6, name: str | None = None, normalisation: dict[str, float] | None = None) -> None:
        super().__init__(name, normalisation)
        if words < 1:
            raise UserError(f"{self.name}: the ideal length must be at least 1 word, got {words}")
        self.words = words

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-abs(len(response.split()) - self.words) for response in responses]
