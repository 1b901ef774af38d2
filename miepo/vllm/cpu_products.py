"""Dense products for a batch of few adapters on a CPU, where vLLM copies the adapter for every token.

With gates all requests have one adapter, or the states of it that requests of a run still name. In a batch of more
adapters vLLM's own functions are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST = 4  # adapters

Rows = Mapping[int, Tensor | slice]  # of the tokens of each adapter, by its slot


def rows_by_slot(slots: Tensor) -> Rows | None:
    """Return the rows of each slot's tokens, from the slots of all ``(tokens,)``; None where there are too many.

    Tokens without an adapter, -1, have no rows.

    >>> import torch
    >>> rows_by_slot(torch.tensor([2, 2])), rows_by_slot(torch.tensor([2, -1, 1]))
    ({2: slice(None, None, None)}, {1: tensor([2]), 2: tensor([0])})
    >>> rows_by_slot(torch.arange(5))
    """
    found = slots.unique().tolist()
    if len(found) == 1 and found[0] >= 0:
        return {found[0]: slice(None)}
    if len(found) > MOST:
        return None
    return {slot: (slots == slot).nonzero().squeeze(1) for slot in found if slot >= 0}


def shrink(y: Tensor, x: Tensor, weights: Tensor, rows: Rows, scale: float) -> None:
    """Write ``scale x A'`` into ``y``: ``(tokens, R), (tokens, D), (slots, 1, R, D)``."""
    for slot, own in rows.items():
        weight = weights[slot, 0].to(x.dtype)
        y[own, : weight.shape[0]] = ((x[own] @ weight.T) * scale).to(y.dtype)


def expand(y: Tensor, x: Tensor, weights: Tensor, rows: Rows, offset: int, size: int, add: bool) -> None:
    """Add ``x B'`` to ``size`` columns of ``y``: ``(tokens, O), (tokens, R), (slots, 1, size, R)``."""
    columns = slice(offset, offset + size)
    for slot, own in rows.items():
        product = x[own].to(y.dtype) @ weights[slot, 0].to(y.dtype).T
        y[own, columns] = y[own, columns] + product if add else product


def install(kernels: Any) -> None:
    """Let vLLM's class for CPUs call these for a batch of few adapters.

    Args:
        kernels: ``PunicaWrapperCPU``.
    """
    update, shrink_any, expand_any = kernels.update_metadata, kernels._apply_shrink, kernels._apply_expand

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        self.rows = rows_by_slot(self.token_lora_indices)

    def apply_shrink(self: Any, y: Tensor, x: Tensor, weights: Tensor, scale: float) -> None:
        if getattr(self, "rows", None) is None or x.shape[0] != len(self.token_lora_indices):
            return shrink_any(self, y, x, weights, scale)
        return shrink(y.view(-1, y.shape[-1]), x, weights, self.rows, scale)

    def apply_expand(
        self: Any, y: Tensor, x: Tensor, weights: Tensor, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        if getattr(self, "rows", None) is None or x.shape[0] != len(self.token_lora_indices):
            return expand_any(self, y, x, weights, offset, size, add_inputs)
        return expand(y, x, weights, self.rows, offset, size, add_inputs)

    kernels.update_metadata, kernels._apply_shrink, kernels._apply_expand = update_metadata, apply_shrink, apply_expand
