"""Rollouts that are sampled while the policy trains on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from miepo.data.rollout import BegunRollout
from miepo.errors import UserError
from miepo.types import PromptBatch, Responses, Tokens

Begin = Callable[[PromptBatch, int | None, Responses | None], BegunRollout]
Place = tuple[tuple[int, int], ...]  # (epoch, position) of each prompt of a batch


def place_of_batch(prompts: PromptBatch) -> Place:
    """Return where the prompts of a batch stand in the run."""
    return tuple(zip(map(int, prompts.epochs), map(int, prompts.positions), strict=True))


class RolloutsAhead:
    """Begins the rollouts of up to ``staleness`` batches before they are trained on.

    With 0 each rollout begins when it is asked for. What is begun when a checkpoint is written goes into it, so that a
    run that was stopped goes on with the responses that it would have had.

    Args:
        staleness: Batches ahead.
    """

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.begun: deque[BegunRollout] = deque()
        self.kept: dict[Place, tuple[int, Responses]] = {}  # of a checkpoint

    def take(self, prompts: PromptBatch, begin: Begin) -> BegunRollout:
        """Return the rollout of a batch, which begins now unless it has begun.

        Args:
            prompts: The batch.
            begin: Begins a rollout; where its responses are known, with them and the step at which they were begun.
        """
        place = place_of_batch(prompts)
        while self.begun and place_of_batch(self.begun[0].prompts) != place:  # an epoch was cut short
            with suppress(UserError):
                self.begun.popleft().responses()  # the engine counts on being asked
        if not self.begun:
            self._begin(prompts, begin)
        return self.begun.popleft()

    def begin_following(self, following: Iterator[PromptBatch], begin: Begin) -> None:
        """Begin the rollouts of the batches after one, whose responses are there: they would wait for each other.

        Args:
            following: The batches after it, as far as the run goes.
            begin: As of :meth:`take`.
        """
        ahead = {place_of_batch(begun.prompts) for begun in self.begun}
        for batch, _ in zip(following, range(self.staleness), strict=False):
            if place_of_batch(batch) not in ahead:
                self._begin(batch, begin)

    def _begin(self, prompts: PromptBatch, begin: Begin) -> None:
        self.begun.append(begin(prompts, *self.kept.pop(place_of_batch(prompts), (None, None))))

    def state(self) -> list[dict[str, Any]]:
        """Return what is begun, with its responses, for which this waits.

        What cannot be sampled now is left out: a run that goes on samples it again.
        """
        kept = []
        for begun in self.begun:
            try:
                responses = begun.responses()
            except UserError as error:
                rank_zero_warn(f"a rollout that was begun is not in the checkpoint: {error}")
                break
            kept.append({"place": place_of_batch(begun.prompts), "step": begun.step, "responses": _as_plain(responses)})
        return kept

    def load_state(self, kept: Sequence[dict[str, Any]]) -> None:
        """Take what :meth:`state` gave, of all processes: each looks for its own batches."""
        self.begun.clear()
        self.kept = {
            tuple(map(tuple, entry["place"])): (int(entry["step"]), _of_plain(entry["responses"])) for entry in kept
        }


def _as_plain(responses: Responses) -> dict[str, Any]:
    """Return responses as tensors and lists, which a checkpoint may hold."""
    return {
        "ids": responses.tokens.ids.cpu(),
        "mask": responses.tokens.mask.cpu(),
        "texts": [list(row) for row in responses.texts],
        "finished": responses.finished.cpu(),
        "log_prob": None if responses.log_prob is None else responses.log_prob.cpu(),
        "counts": dict(responses.counts),
    }


def _of_plain(entry: dict[str, Any]) -> Responses:
    tokens = Tokens(entry["ids"], entry["mask"])
    return Responses(tokens, entry["texts"], entry["finished"], entry["log_prob"], entry["counts"])
