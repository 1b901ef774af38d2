"""Decoding token by token with the network as it is: for those that the fused decoder does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from miepo.policy import Policy
from miepo.types import Tokens


class PlainDecoder:
    """One response to each of ``N`` prompts, row by row, as :class:`~miepo.rollout.fused_decoder.FusedDecoder` does.

    Args:
        policy: In evaluation mode.
        prompts: ``(N, P)``.
        preference: ``(N, K)``.
    """

    def __init__(self, policy: Policy, prompts: Tokens, preference: Tensor) -> None:
        self.policy, self.prompts, self.preference = policy, prompts, preference
        self.mask = prompts.mask.long()  # (N, P + t)
        self.cache = DynamicCache(config=policy.causal_lm.config)

    def start(self) -> Tensor:
        """Return logits of the first token of every row, ``(N, V)``."""
        return self._logits(self.prompts.ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def next(self, tokens: Tensor) -> Tensor:
        """Return logits of the token after ``tokens`` ``(N,)``, ``(N, V)``."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._logits(tokens.unsqueeze(1), self.mask.sum(1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows ``(n,)`` alone."""
        self.mask, self.preference = self.mask[rows], self.preference[rows.to(self.preference.device)]
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]

    @property
    def joins(self) -> bool:
        """Whether rows can come later: the cache holds every token, and nothing else."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, other: PlainDecoder) -> None:
        """Go on with the rows of ``other``, too, as the fused decoder does."""
        begins = [int(d.mask.any(0).long().argmax()) for d in (self, other)]  # the first place that is read
        end = max(d.mask.shape[1] - begin for d, begin in zip((self, other), begins, strict=True))

        def moved(tensors: list[Tensor], around: list[int]) -> Tensor:
            """Along the dimension before those ``around`` says."""
            dim = tensors[0].ndim - 1 - len(around) // 2
            found = [x.narrow(dim, b, x.shape[dim] - b) for x, b in zip(tensors, begins, strict=True)]
            return torch.cat([F.pad(x, [*around, end - x.shape[dim], 0]) for x in found])

        self.mask = moved([self.mask, other.mask], [])
        self.preference = torch.cat([self.preference, other.preference])
        ours: list[Any] = self.cache.layers
        theirs: list[Any] = other.cache.layers
        for mine, yours in zip(ours, theirs, strict=True):
            mine.keys = moved([mine.keys, yours.keys], [0, 0])
            mine.values = moved([mine.values, yours.values], [0, 0])

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self.policy.conditioned(self.preference):
            logits: Tensor = self.policy.causal_lm(
                input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
                use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
        return logits[:, -1].float()
