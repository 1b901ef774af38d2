"""How a batch is scored by all objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from math import nan
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor

from miepo.errors import ObjectiveError
from miepo.objectives.base import (
    Objective,
)

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call ``function`` in a thread of its own, which does not keep the process alive: it may never end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, name="objective", daemon=True).start()
    return future


def start_scoring(
    objectives: Sequence[Objective],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    asked: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Ask concurrent objectives at once, each in a thread of its own; what it returns asks the others and waits.

    Args:
        objectives: ``K`` objectives.
        prompts: ``B`` prompts.
        responses: ``n`` responses for each.
        asked: ``(B, K)`` True where the objective is asked about the prompt; None asks all.

    Returns:
        A function that returns raw rewards of all responses by all objectives, higher is better: ``(B, n, K)`` float32,
        NaN where an objective was not asked.
    """
    count = len(responses[0])
    rows = [
        list(range(len(prompts))) if asked is None else asked[:, k].nonzero().flatten().tolist()
        for k in range(len(objectives))
    ]

    def rewards_of(k: int) -> Tensor:
        repeated = [prompts[b] for b in rows[k] for _ in range(count)]
        return objectives[k].reward(repeated, [text for b in rows[k] for text in responses[b]]).view(-1, count)

    waiting = [k for k, objective in enumerate(objectives) if objective.concurrent and rows[k]]
    started: dict[int, Future[Tensor]] = {k: in_thread(partial(rewards_of, k)) for k in waiting}

    def finish() -> Tensor:
        rewards = torch.full((len(prompts), count, len(objectives)), nan)
        for k in sorted(range(len(objectives)), key=started.__contains__):  # those that wait are waited for last
            rewards[rows[k], :, k] = started[k].result() if k in started else rewards_of(k)
            objectives[k].has_scored |= bool(rewards[rows[k], :, k].isfinite().any())
            if rows[k] and not objectives[k].has_scored and not objectives[k].failures:
                raise ObjectiveError(
                    f"objective {objectives[k].name} gave no number: expected a finite score of at least one of "
                    f"{len(rows[k]) * count} responses"
                )
        return rewards

    return finish


def score_responses(
    objectives: Sequence[Objective],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    asked: Tensor | None = None,
) -> Tensor:
    """Return raw rewards ``(B, n, K)`` of all responses, when all have answered; see :func:`start_scoring`."""
    return start_scoring(objectives, prompts, responses, asked)()


def normalise_rewards(objectives: Sequence[Objective], rewards: Tensor) -> Tensor:
    """Normalise each column by its objective's normalisation, ``(.., K) -> (.., K)``."""
    return torch.stack([o.normalise(rewards[..., k]) for k, o in enumerate(objectives)], -1)
