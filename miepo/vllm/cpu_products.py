"""Dense products for a batch of one adapter on a CPU, where vLLM copies the adapter for every token.

With gates all requests have one adapter, so that this is the usual batch. In a batch of several adapters vLLM's own
functions are called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def only_slot(slots: Tensor) -> int | None:
    """Return the slot of all tokens ``(tokens,)`` that have an adapter, others being -1; None of several slots.

    >>> import torch
    >>> only_slot(torch.tensor([2, 2, -1])), only_slot(torch.tensor([2, 1])), only_slot(torch.tensor([-1]))
    (2, None, None)
    """
    most = int(slots.max()) if len(slots) else -1
    return most if most >= 0 and bool(((slots == most) | (slots < 0)).all()) else None


def shrink(y: Tensor, x: Tensor, weights: Tensor, slot: int, scale: float) -> None:
    """Write ``scale x A'`` into ``y``: ``(tokens, R), (tokens, D), (slots, 1, R, D)``."""
    weight = weights[slot, 0].to(x.dtype)
    y[:, : weight.shape[0]] = (x @ weight.T).mul_(scale)


def expand(y: Tensor, x: Tensor, weights: Tensor, slot: int, offset: int, size: int, add: bool) -> None:
    """Add ``x B'`` to ``size`` columns of ``y``: ``(tokens, O), (tokens, R), (slots, 1, size, R)``."""
    weight = weights[slot, 0]
    product = x.to(y.dtype) @ weight.to(y.dtype).T
    part = y[:, offset : offset + size]
    if add:
        part += product
    else:
        part.copy_(product)


def install(kernels: Any) -> None:
    """Let vLLM's class for CPUs call these for a batch of one adapter.

    Args:
        kernels: ``PunicaWrapperCPU``.
    """
    update, shrink_any, expand_any = kernels.update_metadata, kernels._apply_shrink, kernels._apply_expand

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        self.only_slot = only_slot(self.token_lora_indices)

    def apply_shrink(self: Any, y: Tensor, x: Tensor, weights: Tensor, scale: float) -> None:
        if getattr(self, "only_slot", None) is None or x.shape[0] != len(self.token_lora_indices):
            return shrink_any(self, y, x, weights, scale)
        return shrink(y.view(-1, y.shape[-1]), x, weights, self.only_slot, scale)

    def apply_expand(
        self: Any, y: Tensor, x: Tensor, weights: Tensor, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        if getattr(self, "only_slot", None) is None or x.shape[0] != len(self.token_lora_indices):
            return expand_any(self, y, x, weights, offset, size, add_inputs)
        return expand(y, x, weights, self.only_slot, offset, size, add_inputs)

    kernels.update_metadata, kernels._apply_shrink, kernels._apply_expand = update_metadata, apply_shrink, apply_expand
