"""Short responses."""

from __future__ import annotations

from collections.abc import Sequence

from miepo.errors import UserError
from miepo.objectives.base import Objective


class Brevity(Objective):
    """Few characters, with a floor: minus the distance from the ideal length, so that silence is not the optimum.

    Characters and not words: a policy that is paid for few words learns to leave out the spaces.

    Args:
        characters: The ideal length.
        name: See :class:`~miepo.objectives.base.Objective`.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def __init__(
        self, characters: int = 30, name: str | None = None, normalisation: dict[str, float] | None = None
    ) -> None:
        super().__init__(name, normalisation)
        if characters < 1:
            raise UserError(f"{self.name}: the ideal length must be at least 1 character, got {characters}")
        self.characters = characters

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-float(abs(len(response) - self.characters)) for response in responses]
