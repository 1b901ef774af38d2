"""Token log-probabilities without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that exist at one time. On the CPU at hand 2**20 to 2**24 took about the same time, so memory decides; a GPU
# wants large products (its figure is not measured).
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}


def token_log_prob(
    states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    temperature: float,
    frozen: bool = True,
) -> Tensor:
    """Return the log-probability of tokens given the hidden states that predict them.

    The states are projected on the vocabulary in chunks. A log-probability is one number and depends on one state, so
    its gradient is known as soon as it is: a chunk leaves that gradient, ``(chunk, D)``, and no logits. Under a head
    that trains, whose own gradient needs them, the backward pass computes the logits again.

    Args:
        states: ``(n, D)`` hidden state at the position before each token.
        targets: ``(n,)`` the tokens.
        head: The projection on the vocabulary, ``(n, D) -> (n, V)``.
        vocabulary: ``V``.
        temperature: Of the distribution that is sampled.
        frozen: Whether the head has no parameters that train.

    Returns:
        ``(n,)`` float32 in nats.
    """

    def chunk_log_prob(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()
        return -F.cross_entropy(logits if temperature == 1 else logits / temperature, targets, reduction="none")

    size = max(CHUNK_LOGITS.get(states.device.type, 2**27) // vocabulary, 1)
    if not len(targets):
        return states.new_zeros(0, dtype=torch.float32)
    chunks = list(zip(states.split(size), targets.split(size), strict=True))
    if not (torch.is_grad_enabled() and (states.requires_grad or not frozen)):
        return torch.cat([chunk_log_prob(s, t) for s, t in chunks])
    if not frozen:
        return torch.cat([checkpoint(chunk_log_prob, s, t, use_reentrant=False) for s, t in chunks])
    return _GradientAtOnce.apply(chunk_log_prob, size, states, targets)  # type: ignore[no-untyped-call]


class _GradientAtOnce(torch.autograd.Function):
    """A function of rows, one number each, that computes the gradient of every row while it computes the number."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor, Tensor], Tensor], size: int, states: Tensor, targets: Tensor
    ) -> Tensor:
        values, gradients = [], []
        for s, t in zip(states.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                s = s.detach().requires_grad_()
                value = function(s, t)
                gradients += torch.autograd.grad(value.sum(), s)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, None, (gradient * upstream.unsqueeze(-1)).to(gradient.dtype), None
