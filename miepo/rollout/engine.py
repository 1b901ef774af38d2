"""The one interface behind which responses are sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from miepo.errors import UserError
from miepo.recorded import Recorded
from miepo.text import cut_at
from miepo.types import Responses, Tokens

if TYPE_CHECKING:
    from miepo.policy import Policy
from miepo.seeding import prompt_seeds


class RolloutEngine(Recorded, ABC):
    """Samples from the policy as it is now; the policy does not know which engine does it.

    Args:
        stop: Texts that end a response, as an end token does: the tokens that spell one count, its text is cut off.

    Attributes:
        samples_elsewhere: Whether it samples while the policy trains on, from the policy as it was when it began.
        max_gap: Largest mean distance of its log-probabilities from the policy's, in nats a token; beyond, a run ends.
    """

    samples_elsewhere: ClassVar[bool] = False
    max_gap: float = inf

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"an engine's stop must be a list of texts that are not empty, got {stop!r}")
        self.stop = tuple(stop)

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
    ) -> Responses:
        """Return ``count`` responses per prompt, drawn from ``pi_theta(. | x, w)`` itself.

        Nothing truncated or penalised.

        Args:
            policy: The policy to sample from.
            prompts: ``N`` prompts.
            preference: ``(N, K)``.
            count: Responses per prompt.
            max_new_tokens: A response is cut after this many tokens.
            seed: Fixes the draw; the global random state is left as it was. With one for each prompt a prompt's
                responses do not depend on the others in the batch.
        """
        return self.begin(policy, prompts, preference, count, max_new_tokens, prompt_seeds(seed, len(prompts)))()

    def begin(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> Callable[[], Responses]:
        """Begin to sample as :meth:`draw` does, and return what waits for the responses.

        An engine that computes in this process has sampled when this returns.
        """
        responses = self.draw(policy, prompts, preference, count, max_new_tokens, seeds)
        return lambda: responses

    @abstractmethod
    def draw(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> Responses:
        """Sample as :meth:`sample` promises, with a seed for each of the ``N`` prompts; a subclass writes this.

        Returns:
            Tokens ``(N, count, T)`` with their texts, as :func:`make_responses` makes of sampled ids.
        """


def response_mask(ids: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which sampled tokens count: all up to and with the first end token.

    Args:
        ids: ``(.., T)``.
        end_ids: Tokens that end a response.

    Returns:
        The mask ``(.., T)`` and whether a response ended by itself ``(..)``.
    """
    ends = torch.isin(ids, torch.tensor(end_ids, device=ids.device))
    ended_before = ends.long().cumsum(-1) - ends.long()
    return ended_before == 0, ends.any(-1)


def make_responses(policy: Policy, ids: Tensor, stop: Sequence[str] = ()) -> Responses:
    """Return sampled ids ``(N, n, T)`` as a record.

    Mask, texts, and only as many columns as the longest response needs.
    """
    mask, finished = (x.cpu() for x in response_mask(ids, policy.end_ids))
    texts = []
    for n, rows in enumerate(ids.cpu()):
        texts.append([""] * len(rows))
        for i, row in enumerate(rows):
            text, length = _cut_tokens(policy.tokenizer, row[: int(mask[n, i].sum())], stop)
            texts[n][i] = text.strip()
            if length is not None:
                mask[n, i, length:], finished[n, i] = False, True
    width = max(int(mask.sum(-1).max()), 1)
    ids, mask, finished = ids[..., :width], mask[..., :width].to(ids.device), finished.to(ids.device)
    return Responses(Tokens(torch.where(mask, ids, policy.tokenizer.pad_token_id), mask), texts, finished)


def responses_with_log_prob(
    policy: Policy, answers: Sequence[Sequence[tuple[Sequence[int], Sequence[float]]]], stop: Sequence[str] = ()
) -> Responses:
    """Return what an engine of its own has sampled as a record.

    Args:
        policy: Whose tokens they are.
        answers: ``N`` rows of ``n`` pairs: the ids of a response, and the engine's log-probability of each.
        stop: As of :class:`RolloutEngine`.
    """
    longest = max(len(ids) for row in answers for ids, _ in row)
    ids = torch.full((len(answers), len(answers[0]), max(longest, 1)), policy.end_id)
    log_prob = torch.zeros(ids.shape)
    for i, row in enumerate(answers):
        for j, (tokens, values) in enumerate(row):
            ids[i, j, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
            log_prob[i, j, : len(tokens)] = torch.tensor(values)
    responses = make_responses(policy, ids.to(policy.device), stop)
    mask = responses.tokens.mask
    masked = torch.where(mask, log_prob[..., : mask.shape[-1]].to(mask.device), 0.0)
    return replace(responses, log_prob=masked)


def _cut_tokens(tokenizer: Any, row: Tensor, stop: Sequence[str]) -> tuple[str, int | None]:
    """Return the text of tokens ``(t,)`` up to a stop text, and how many tokens spell it; None where there is none."""

    def stopped(length: int) -> bool:
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        return cut_at(text, stop) != text

    text = tokenizer.decode(row, skip_special_tokens=True)
    cut = cut_at(text, stop)
    return cut, None if cut == text else bisect_left(range(len(row)), True, key=stopped)
