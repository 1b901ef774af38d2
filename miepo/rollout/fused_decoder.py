"""The network of a Llama-like policy laid out for decoding, adapter and gate included.

In the network that trains each of seven projections per layer is a product with the weights, two with the adapter, a
cast, a scale and a sum. Here the projections that read the same states are one product, adapter included, and the
prompt is computed once for all its responses. How much that saves is in ``tools/benchmarks/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from miepo.policy import Policy
from miepo.policy.policy import ADAPTER
from miepo.types import Tokens

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def fits(policy: Policy) -> bool:
    """Whether the policy's network is one that :class:`FusedDecoder` computes."""
    config: Any = policy.causal_lm.config
    return config.model_type in ARCHITECTURES and config.hidden_act == "silu" and policy.plain_attention


@dataclass(frozen=True)
class _Projection:
    """Linear layers that read the same states, as one: their weights, and below these the first factors of LoRA."""

    weight: Tensor  # (O + R, D)
    second: Tensor | None  # (R, O) the second factors, scaled, block by block
    bias: Tensor | None  # (O,)
    gate: Tensor | None  # (N, R)

    @classmethod
    def of(cls, layers: list[Any], gate: Tensor | None) -> _Projection:
        adapted = [isinstance(layer, LoraLayer) for layer in layers]
        plain: list[Any] = [layer.base_layer if a else layer for layer, a in zip(layers, adapted, strict=True)]
        weights: list[Tensor] = [layer.weight for layer in plain]
        dtype = weights[0].dtype
        first: list[Tensor] = []
        second: list[Tensor] = []
        for layer, weight, a in zip(layers, weights, adapted, strict=True):
            if a:
                first.append(layer.lora_A[ADAPTER].weight.to(dtype))
                second.append((layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]).to(dtype).T)
            else:
                second.append(weight.new_zeros(0, len(weight)))
        bias = None
        if any(layer.bias is not None for layer in plain):
            bias = torch.cat(
                [w.new_zeros(len(w)) if p.bias is None else p.bias for p, w in zip(plain, weights, strict=True)]
            )
        return cls(
            torch.cat([*weights, *first]),
            torch.block_diag(*second) if first else None,
            bias,
            None if gate is None or not first else gate.to(dtype).repeat(1, len(first)),
        )

    def __call__(self, states: Tensor) -> Tensor:
        """``(N, D) -> (N, O)``."""
        out = F.linear(states, self.weight)
        if self.second is not None:
            size = self.second.shape[1]
            low = out[:, size:] if self.gate is None else out[:, size:] * self.gate
            out = torch.addmm(out[:, :size], low, self.second)
        return out if self.bias is None else out + self.bias

    def rows(self, kept: Tensor) -> _Projection:
        return self if self.gate is None else _Projection(self.weight, self.second, self.bias, self.gate[kept])


class FusedDecoder:
    """Decodes ``count`` responses to each of ``B`` prompts, row by row of ``N = B count``.

    It holds a copy of the weights of all layers for as long as it lives.

    Args:
        policy: For which :func:`fits` is true; within :meth:`Policy.evaluating`.
        prompts: ``(B, P)``.
        preference: ``(B, K)``.
        count: Responses per prompt.
        max_new_tokens: ``T``.
    """

    def __init__(self, policy: Policy, prompts: Tokens, preference: Tensor, count: int, max_new_tokens: int) -> None:
        self.policy = policy
        body: Any = policy.body
        config: Any = policy.causal_lm.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.norm = config.rms_norm_eps, body.norm.weight
        self.embedding: Tensor = body.embed_tokens.weight
        cache = DynamicCache()
        lengths = prompts.mask.sum(-1)  # (B,)
        with policy.conditioned(preference):
            hidden = body(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                position_ids=(prompts.mask.long().cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, P, D)
        self.first = hidden[:, -1].repeat_interleave(count, 0)  # (N, D)
        self.time = width = prompts.ids.shape[1]
        self.keys: list[Tensor] = []  # (N, groups, P + T, size) each
        self.values: list[Tensor] = []
        layers: Any = cache.layers
        for layer in layers:
            for kept, cached in ((self.keys, layer.keys), (self.values, layer.values)):
                room = cached.new_empty(len(cached) * count, self.groups, width + max_new_tokens, cached.shape[-1])
                room[:, :, :width] = cached.repeat_interleave(count, 0)
                kept.append(room)
        del cache
        gate = policy.gate_of(preference.repeat_interleave(count, 0))  # (N, R)
        self.layers = [_layer(layer, gate) for layer in body.layers]
        dtype = self.embedding.dtype
        positions = lengths.repeat_interleave(count).unsqueeze(1) + torch.arange(max_new_tokens, device=lengths.device)
        cos, sin = body.rotary_emb(self.first.to(dtype), positions)  # (N, T, size)
        self.cos, self.sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
        padding = torch.zeros(prompts.mask.shape, dtype=dtype, device=lengths.device)
        padding = padding.masked_fill(~prompts.mask, torch.finfo(dtype).min).repeat_interleave(count, 0)
        self.padding = F.pad(padding, (0, max_new_tokens))[:, None, None]  # (N, 1, 1, P + T)
        self.step = 0

    def start(self) -> Tensor:
        """Logits of the first token of every row, ``(N, V)``."""
        return self._logits(self.first)

    def next(self, tokens: Tensor) -> Tensor:
        """Logits of the token after ``tokens`` ``(N,)``, ``(N, V)``."""
        states = F.embedding(tokens, self.embedding)  # (N, D)
        cos, sin = self.cos[:, self.step], self.sin[:, self.step]  # (N, 1, size)
        heads, groups, end = self.heads, self.groups, self.time + 1
        padding = self.padding[..., :end]
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            read = layer["attention"](F.rms_norm(states, states.shape[-1:], layer["norm"], self.eps))
            each = read.unflatten(1, (heads + 2 * groups, -1))  # (N, heads, size)
            size = each.shape[-1]
            turned = each[:, : heads + groups]
            if layer["query_norm"] is not None:
                turned = torch.cat(
                    [
                        F.rms_norm(turned[:, :heads], (size,), layer["query_norm"], self.eps),
                        F.rms_norm(turned[:, heads:], (size,), layer["key_norm"], self.eps),
                    ],
                    1,
                )
            half = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
            turned = turned * cos + half * sin
            keys[:, :, self.time], values[:, :, self.time] = turned[:, heads:], each[:, heads + groups :]
            queries = turned[:, :heads].unflatten(1, (groups, -1)) * layer["scale"]  # (N, groups, heads / groups, size)
            weights = (queries @ keys[:, :, :end].transpose(-1, -2) + padding).softmax(-1)
            states = states + layer["output"]((weights @ values[:, :, :end]).flatten(1))
            gate, up = layer["up"](F.rms_norm(states, states.shape[-1:], layer["second_norm"], self.eps)).chunk(2, 1)
            states = states + layer["down"](F.silu(gate) * up)
        self.time, self.step = end, self.step + 1
        return self._logits(F.rms_norm(states, states.shape[-1:], self.norm, self.eps))

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows ``(n,)`` alone."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.cos, self.sin, self.padding = self.cos[rows], self.sin[rows], self.padding[rows]
        for layer in self.layers:
            for name in ("attention", "output", "up", "down"):
                layer[name] = layer[name].rows(rows)

    def _logits(self, states: Tensor) -> Tensor:
        with self.policy.autocast():
            return self.policy.project(states).float()


def _layer(layer: Any, gate: Tensor | None) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, f"{name}_norm", None) for name in "qk"]
    return {
        "norm": layer.input_layernorm.weight,
        "second_norm": layer.post_attention_layernorm.weight,
        "query_norm": None if norms[0] is None else norms[0].weight,
        "key_norm": None if norms[1] is None else norms[1].weight,
        "scale": attention.scaling,
        "attention": _Projection.of([attention.q_proj, attention.k_proj, attention.v_proj], gate),
        "output": _Projection.of([attention.o_proj], gate),
        "up": _Projection.of([mlp.gate_proj, mlp.up_proj], gate),
        "down": _Projection.of([mlp.down_proj], gate),
    }
