"""Decoding token by token with the network as it is: for those that the fused decoder does not know."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

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
        """Logits of the first token of every row, ``(N, V)``."""
        return self._logits(self.prompts.ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def next(self, tokens: Tensor) -> Tensor:
        """Logits of the token after ``tokens`` ``(N,)``, ``(N, V)``."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._logits(tokens.unsqueeze(1), self.mask.sum(1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows ``(n,)`` alone."""
        self.mask, self.preference = self.mask[rows], self.preference[rows.to(self.preference.device)]
        self.cache.batch_select_indices(rows)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self.policy.conditioned(self.preference):
            logits: Tensor = self.policy.causal_lm(
                input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
                use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
        return logits[:, -1].float()
