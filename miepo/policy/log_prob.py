"""Token log-probabilities without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that exist at one time. On the CPU at hand 2**20 to 2**24 took about the same time, so memory decides; a GPU
# wants large products (its figure is not measured).
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}


def token_log_prob(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, temperature: float
) -> Tensor:
    """Log-probability of tokens given the hidden states that predict them.

    The states are projected on the vocabulary in chunks that the backward pass computes again.

    Args:
        states: ``(n, D)`` hidden state at the position before each token.
        targets: ``(n,)`` the tokens.
        head: The projection on the vocabulary, ``(n, D) -> (n, V)``.
        vocabulary: ``V``.
        temperature: Of the distribution that is sampled.

    Returns:
        ``(n,)`` float32 in nats.
    """

    def chunk_log_prob(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()
        return -F.cross_entropy(logits if temperature == 1 else logits / temperature, targets, reduction="none")

    size = max(CHUNK_LOGITS.get(states.device.type, 2**27) // vocabulary, 1)
    parts = [
        checkpoint(chunk_log_prob, s, t, use_reentrant=False) if torch.is_grad_enabled() else chunk_log_prob(s, t)
        for s, t in zip(states.split(size), targets.split(size), strict=True)
        if len(t)
    ]
    return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)
