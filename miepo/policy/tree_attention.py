"""Attention along the branches of trees, as an attention function of Transformers.

A mask over all places would compute every pair of branches to throw it away. Here the runs of tokens that continue
like paths are gathered: each attends to its own path and nothing else is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "miepo_branches"
# Up to so many keys, products and a softmax are faster on a CPU, backward above all, than the kernel that never holds
# the weights (tools/benchmarks/README.md); with more keys the weights take too much memory.
PRODUCT_KEYS = 512


@dataclass(frozen=True)
class Runs:
    """``n`` runs of tokens of like lengths, padded to ``Q`` tokens and to paths of ``S`` places."""

    queries: Tensor  # (n, Q) places
    keys: Tensor  # (n, S) places
    bias: Tensor  # (n, 1, Q, S) 0 where a token sees a place, else the most negative number


@dataclass(frozen=True)
class Branches:
    """What each of ``L`` places sees."""

    runs: list[Runs]
    order: Tensor  # (L,) where each place is among the tokens of all runs, padding included

    @classmethod
    def of(cls, paths: Sequence[tuple[list[int], int]], dtype: torch.dtype, device: torch.device | str) -> Branches:
        """Make one of paths, each with the number of its last places whose tokens the run holds.

        Every place is in one run.
        """
        groups: dict[tuple[int, int], list[tuple[list[int], int]]] = defaultdict(list)
        for path, new in paths:
            groups[new.bit_length(), len(path).bit_length()].append((path, new))  # so that padding is less than half
        runs, order, start = [], [0] * sum(new for _, new in paths), 0
        for group in groups.values():
            q, s = max(new for _, new in group), max(len(path) for path, _ in group)
            queries, keys = [], []
            for path, new in group:
                places = path[-new:]
                queries.append([*places, *[places[-1]] * (q - new)])
                keys.append([*path, *[path[-1]] * (s - len(path))])
                for i, place in enumerate(places, start):
                    order[place] = i
                start += q
            new_tokens = torch.tensor([[new] for _, new in group], device=device)  # (n, 1)
            length = torch.tensor([[len(path)] for path, _ in group], device=device)
            token = torch.minimum(torch.arange(q, device=device).expand(len(group), -1), new_tokens - 1)  # (n, Q)
            last = length - new_tokens + token  # (n, Q) the token itself
            hidden = torch.arange(s, device=device) > last.unsqueeze(-1)  # (n, Q, S)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
            runs.append(
                Runs(torch.tensor(queries, device=device), torch.tensor(keys, device=device), bias.unsqueeze(1))
            )
        return cls(runs, torch.tensor(order, device=device))


def branch_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    branches: Branches | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention along ``branches``: ``(1, heads, L, size) -> (1, L, heads, size)``.

    Without them PyTorch's own.
    """
    if branches is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (L, heads or groups, size)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = []
    for run in branches.runs:
        few = query.device.type == "cpu" and run.keys.shape[1] <= PRODUCT_KEYS
        attend = _by_products if few else _by_kernel
        q = query.index_select(0, run.queries.flatten()).unflatten(0, run.queries.shape)  # (n, Q, heads, size)
        k, v = (x.index_select(0, run.keys.flatten()).unflatten(0, run.keys.shape) for x in (key, value))
        out.append(attend(q, k, v, run.bias, scaling, dropout).flatten(0, 1))  # (n Q, heads, size)
    return torch.cat(out).index_select(0, branches.order).unsqueeze(0), None


def _by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, dropout: float) -> Tensor:
    """Return ``(n, Q, heads, size)``, ``(n, S, groups, size)`` twice ``-> (n, Q, heads, size)``."""
    n, tokens, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    size = heads // groups  # heads that read the same keys are rows of one product
    q = (q * scaling).unflatten(2, (groups, size)).permute(0, 2, 3, 1, 4).reshape(n * groups, size * tokens, -1)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (n groups, S, size)
    weights = (q @ k.transpose(1, 2)).view(n, heads, tokens, keys) + bias
    weights = F.dropout(weights.softmax(-1), dropout, dropout > 0)
    out = weights.view(n * groups, size * tokens, keys) @ v  # (n groups, size Q, dimensions)
    return out.view(n, heads, tokens, -1).transpose(1, 2)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, dropout: float) -> Tensor:
    """Do as :func:`_by_products`, by PyTorch's kernel."""
    size = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(size, 2).transpose(1, 2) for x in (k, v))  # (n, heads, S, size)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2)


AttentionInterface.register(NAME, branch_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
