"""An objective that may fail: a server that is slow, down for a moment, or wrong about one batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from time import sleep
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from miepo.errors import ObjectiveError, UserError
from miepo.objectives.base import TRIAL, Objective, identity_of
from miepo.objectives.scoring import in_thread
from miepo.renamed import old_names


class RetryingObjective(Objective):
    """Asks another objective again when it fails or takes too long, and can go on without its scores.

    A failure is an exception, scores of a wrong shape, or no answer in time. ``count/failed/NAME`` in the log is how
    often, in a step, it had not answered after the last attempt. When it is loaded it must answer: a server that was
    never there is a mistake and not a failure.

    Args:
        objective: Whose scores, name, normalisation and sign it has.
        timeout: Seconds to wait for an answer; by default as long as it takes. A late answer is thrown away.
        retries: Further attempts after the first.
        backoff: Seconds before the second attempt; each later one waits twice as long as the one before.
        on_failure: ``error`` ends the run; ``skip`` goes on without scores for these responses, which then have no
            label for this objective and no gradient from it.
    """

    identity = ("of",)
    concurrent = True

    def __init__(
        self,
        objective: Objective,
        timeout: float | None = None,
        retries: int = 2,
        backoff: float = 1.0,
        on_failure: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(objective.name)
        if timeout is not None and not timeout > 0:
            raise UserError(f"{self.name}: timeout must be positive, got {timeout}")
        for key, value in (("retries", retries), ("backoff", backoff)):
            if not value >= 0:
                raise UserError(f"{self.name}: {key} must not be negative, got {value}")
        if on_failure not in ("error", "skip"):
            raise UserError(f"{self.name}: on_failure must be error or skip, got {on_failure!r}")
        self.objective, self.timeout, self.retries, self.backoff = objective, timeout, retries, backoff
        self.on_failure = on_failure
        self.normalisation, self.normalisation_given = objective.normalisation, objective.normalisation_given

    @property
    def of(self) -> dict[str, Any]:
        """The identity of the objective behind it."""
        return identity_of(self.objective)

    def load(self, device: torch.device) -> None:
        self.objective.load(device)
        self._answer(*TRIAL)

    def check(self) -> None:
        self.objective.check()

    # -- what the objective behind it keeps of its own, beside the normalisation ---------------------------------------

    def state_dict(self) -> dict[str, Any]:
        inner = self.objective.state_dict()
        return super().state_dict() | ({"objective": inner} if inner else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.objective.load_state_dict(state_dict.get("objective", {}))

    def unload(self) -> None:
        self.objective.unload()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        answer = self._ask(prompts, responses)
        if isinstance(answer, Tensor):
            return answer
        if self.on_failure == "error":
            raise ObjectiveError(answer[0].upper() + answer[1:])
        self.failures += 1
        rank_zero_warn(f"{self.name} is left out of a batch, {answer}")
        return torch.full((len(prompts),), torch.nan)

    def _ask(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | str:
        """Return what it says, or what went wrong at the last attempt."""
        error: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return self._answer(prompts, responses)
            except Exception as caught:
                error = caught
        return f"after {self.retries + 1} attempts: {error}"

    def _answer(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        if self.timeout is None:
            return self.objective.reward(prompts, responses)
        asked = in_thread(lambda: self.objective.reward(prompts, responses))
        if not wait([asked], self.timeout).done:
            raise ObjectiveError(f"objective {self.name}: no answer in {self.timeout:g} s")
        return asked.result()


__getattr__ = old_names(__name__, Patient=RetryingObjective)
