"""The loss of a step part by part: the activations of one part of the batch exist at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from miepo.types import PreferenceBatch

T = TypeVar("T")


def in_micro_batches(
    loss: Callable[[PreferenceBatch], tuple[Tensor, T]],
    parts: Sequence[PreferenceBatch],
    parameters: Sequence[nn.Parameter],
) -> tuple[Tensor, list[T]]:
    """Return the mean loss over all prompts, and what else ``loss`` returns of each part.

    The gradient of a part is taken as soon as its loss is known, and kept until the whole is differentiated: the same
    gradient, of which hooks, clipping and accumulation see nothing unusual.

    Args:
        loss: The mean loss over the prompts of a part, in which that of each is a function of that prompt alone.
        parts: Of one batch.
        parameters: All that train.

    Returns:
        A scalar, and one of the others for each part.
    """
    whole, others = sum(map(len, parts)), []

    def share(part: PreferenceBatch) -> Tensor:
        value, other = loss(part)
        others.append(other)
        return value * (len(part) / whole)

    if len(parts) == 1:
        return share(parts[0]), others
    return _MicroBatched.apply(share, parts, *parameters), others  # type: ignore[no-untyped-call]


class _MicroBatched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: Callable[[PreferenceBatch], Tensor], parts: Sequence[PreferenceBatch], *parameters: Tensor
    ) -> Tensor:
        values, gradients = [], [torch.zeros_like(p) for p in parameters]
        for part in parts:
            with torch.enable_grad():
                value = share(part)
            values.append(value.detach())
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(gradients, found, strict=True):
                if gradient is not None:
                    total += gradient
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)
