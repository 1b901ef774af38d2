"""The one interface behind which responses are sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miepo.types import Responses, Tokens

if TYPE_CHECKING:
    from miepo.policy import Policy


class RolloutEngine(ABC):
    """Samples from the policy as it is now; the policy does not know which engine does it."""

    @abstractmethod
    def sample(
        self, policy: Policy, prompts: Sequence[str], preference: Tensor, count: int, max_new_tokens: int, seed: int
    ) -> Responses:
        """``count`` responses per prompt, drawn from ``pi_theta(. | x, w)`` itself: nothing truncated or penalised.

        Args:
            policy: The policy to sample from.
            prompts: ``N`` prompts.
            preference: ``(N, K)``.
            count: Responses per prompt.
            max_new_tokens: A response is cut after this many tokens.
            seed: Fixes the draw; the global random state is left as it was.
        """


def response_mask(ids: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which sampled tokens count: all up to and with the first end token.

    Args:
        ids: ``(.., T)``.
        end_ids: Tokens that end a response.

    Returns:
        The mask ``(.., T)`` and whether a response ended by itself ``(..)``.
    """
    ends = torch.isin(ids, torch.tensor(end_ids, device=ids.device))
    ended_before = ends.long().cumsum(-1) - ends.long()
    return ended_before == 0, ends.any(-1)


def make_responses(policy: Policy, ids: Tensor) -> Responses:
    """Sampled ids ``(N, n, T)`` as a record: mask, texts, and only as many columns as the longest response needs."""
    mask, finished = response_mask(ids, policy.end_ids)
    width = max(int(mask.sum(-1).max()), 1)
    ids, mask = ids[..., :width], mask[..., :width]
    ids = torch.where(mask, ids, policy.tokenizer.pad_token_id)
    texts = [
        [policy.tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(r, m, strict=True)]
        for r, m in zip(ids.cpu(), mask.cpu(), strict=True)
    ]
    return Responses(Tokens(ids, mask), texts, finished)
