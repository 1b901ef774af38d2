"""The network of a Llama-like policy laid out for decoding, adapter and gate included.

In the network that trains each of seven projections per layer is a product with the weights, two with the adapter, a
cast, a scale and a sum. Here the projections that read the same states are one product, adapter included. The prompt is
computed once for all its responses, by the same products. How much that saves is in ``tools/benchmarks/README.md``.

On a CPU that computes in float32, weights that half precision holds without loss, as those of models published in 16
bits, are read from a copy in half precision, which is made once: what binds there is how fast weights are read, and
sums are of float32. Other weights are copied into the order that the CPU's kernels read, for as long as a rollout
lasts, or as nothing is trained. Elsewhere the network's own weights are laid out so, once, one below the other: no copy
of them exists.

With a cache of fixed size every token is the same kernels on the same memory, which a CUDA graph records once and
replays without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from miepo.policy import Policy
from miepo.policy.policy import ADAPTER
from miepo.types import Tokens

HALF_ERROR = 2.0**-25  # of the numbers that half precision holds with fewer digits, half of the distance between two
# the first of some weights -> what they were when they were copied, and the copy in half precision, if there is one
_HALVES = WeakTensorKeyDictionary()
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def orders_weights(weight: Tensor) -> bool:
    """Return whether products with this weight are faster in an order of oneDNN's own."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def holds_in_half(weights: Sequence[Tensor]) -> bool:
    """Return whether half precision holds float32 weights, as of a model in 16 bits, and this CPU multiplies by it.

    Half precision has three bits more than bfloat16 for a number's digits; what it loses are last digits of numbers
    below 6e-5.
    """
    if any(w.device.type != "cpu" or w.dtype != torch.float32 for w in weights):
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    parts = (part for w in weights for part in w.detach().split(4096))  # without a second copy of the largest
    return all(bool((part.half().float() - part).abs().amax() <= HALF_ERROR) for part in parts)


def fits(policy: Policy) -> bool:
    """Return whether the policy's network is one that :class:`FusedDecoder` computes."""
    config: Any = policy.causal_lm.config
    return (
        config.model_type in ARCHITECTURES
        and config.hidden_act == "silu"
        and policy.plain_attention
        and not policy.own_head
    )


@dataclass(frozen=True)
class _Projection:
    """Linear layers that read the same states, as one: their weights, and below these the first factors of LoRA."""

    product: Callable[[Tensor], Tensor]  # (N, D) -> (N, O + L R), of L layers with an adapter of rank R
    second: Tensor | None  # (L R, O) the second factors, scaled, block by block
    bias: Tensor | None  # (O,)

    @classmethod
    def of(cls, layers: list[Any], rows: int, lasting: bool) -> _Projection | _HalfProjection:
        """Lay layers out for ``rows`` states at a time; their weights last, or are gathered for a rollout."""
        adapted = [isinstance(layer, LoraLayer) for layer in layers]
        plain: list[Any] = [layer.base_layer if a else layer for layer, a in zip(layers, adapted, strict=True)]
        if lasting and (half := _in_half([layer.weight for layer in plain])) is not None:
            return _HalfProjection.of(half, layers, adapted, plain)
        weights: list[nn.Parameter] = [layer.weight for layer in plain]
        dtype = weights[0].dtype
        first: list[Tensor] = []
        second: list[Tensor] = []
        for layer, weight, a in zip(layers, weights, adapted, strict=True):
            if a:
                first.append(layer.lora_A[ADAPTER].weight.to(dtype))
                second.append((layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]).to(dtype).T)
            else:
                second.append(weight.new_zeros(0, len(weight)))
        if orders_weights(weights[0]):
            product = _packed(torch.cat([*weights, *first]), rows)
        else:
            product = _laid_out(weights, first) if lasting else partial(F.linear, weight=torch.cat([*weights, *first]))
        return cls(product, torch.block_diag(*second) if first else None, _bias_of(plain))

    def __call__(self, states: Tensor, gate: Tensor | None) -> Tensor:
        """Return ``(N, D), (N, R) -> (N, O)``."""
        out = self.product(states)
        if self.second is not None:
            size = self.second.shape[1]
            low = out[:, size:]
            if gate is not None:
                low = (low.unflatten(1, (-1, gate.shape[1])) * gate.unsqueeze(1)).flatten(1)
            out = torch.addmm(out[:, :size], low, self.second)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class _HalfProjection:
    """Linear layers that read the same states: their weights in half precision, and LoRA's factors as they are."""

    product: Callable[[Tensor], Tensor]  # (N, D) -> (N, O)
    first: Tensor | None  # (L R, D) of L layers with an adapter of rank R
    second: list[tuple[int, Tensor]]  # of each, where its output begins, and (R, o), scaled
    bias: Tensor | None  # (O,)

    @classmethod
    def of(
        cls, product: Callable[[Tensor], Tensor], layers: list[Any], adapted: list[bool], plain: list[Any]
    ) -> _HalfProjection:
        """Lay out the factors of the adapted layers beside ``product``, that of the plain ones."""
        first, second, start = [], [], 0
        for layer, a, base in zip(layers, adapted, plain, strict=True):
            if a:
                first.append(layer.lora_A[ADAPTER].weight.detach())
                factor = layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
                second.append((start, factor.detach().T.contiguous()))
            start += len(base.weight)
        return cls(product, torch.cat(first) if first else None, second, _bias_of(plain))

    def __call__(self, states: Tensor, gate: Tensor | None) -> Tensor:
        """Return ``(N, D), (N, R) -> (N, O)``."""
        out = self.product(states)
        if self.first is not None:
            low = F.linear(states, self.first).unflatten(1, (len(self.second), -1))  # (N, L, R)
            if gate is not None:
                low = low * gate.unsqueeze(1)
            for part, (start, factor) in zip(low.unbind(1), self.second, strict=True):
                out[:, start : start + factor.shape[1]].addmm_(part, factor)
        return out if self.bias is None else out + self.bias


def _bias_of(layers: Sequence[Any]) -> Tensor | None:
    """Return the biases of layers below one another, 0 where a layer has none; None where none has."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in layers])


def _in_half(weights: Sequence[nn.Parameter]) -> Callable[[Tensor], Tensor] | None:
    """Return the product with the copy of weights in half precision, made at the first call; None where there is none.

    What was trained since is seen by the weight's version.
    """
    state = [(w.data_ptr(), w._version) for w in weights]
    known, packed = _HALVES.get(weights[0], (None, None))
    if known != state:
        packed = None
        if holds_in_half(weights):
            packed = torch.ops.quantized.linear_prepack_fp16(torch.cat([w.detach() for w in weights]), None)
        _HALVES[weights[0]] = state, packed
    return None if packed is None else partial(_product_in_half, packed=packed)


def _product_in_half(states: Tensor, packed: Any) -> Tensor:
    product: Tensor = torch.ops.quantized.linear_dynamic_fp16(states, packed)
    return product


class Layout:
    """The weights of a policy as they are decoded with, adapter included; they must not change while it is used.

    Args:
        policy: For which :func:`fits` is true.
        rows: About as many as are decoded together.
    """

    def __init__(self, policy: Policy, rows: int) -> None:
        body: Any = policy.body
        self.layers = [_layer(layer, rows, policy.shards is None) for layer in body.layers]
        head = policy.causal_lm.get_output_embeddings()
        self.head: Callable[[Tensor], Tensor] | None = None
        if head.bias is None:
            self.head = _in_half([head.weight]) if policy.shards is None else None
            if self.head is None and orders_weights(head.weight):
                self.head = _packed(head.weight, rows)


def _packed(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Lay a weight out in oneDNN's own order.

    Left to itself it orders a weight at every call, which costs as much as the product.
    """
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, ordered, None, "none", [], "")


def _laid_out(weights: Sequence[nn.Parameter], first: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the weights parts of one tensor, if they are not yet; the first factors are written below them."""
    total, rank = sum(map(len, weights)), sum(map(len, first))
    one = weights[0].data
    storage = one.untyped_storage()
    ends = accumulate(map(len, weights), initial=0)
    together = storage.nbytes() == (total + rank) * one.shape[1] * one.itemsize and all(
        w.untyped_storage()._cdata == storage._cdata and w.storage_offset() == start * one.shape[1]
        for w, start in zip(weights, ends, strict=False)
    )
    if together:
        whole = one.as_strided((total + rank, one.shape[1]), (one.shape[1], 1))
    else:
        whole = one.new_empty(total + rank, one.shape[1])
        for weight, part in zip(weights, whole[:total].split([len(w) for w in weights]), strict=True):
            part.copy_(weight.data)
            weight.data = part
    if rank:
        torch.cat([f.detach() for f in first], out=whole[total:])
    return lambda states: F.linear(states, whole)


def recorded(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return ``function`` as a CUDA graph.

    It may change tensors in place, must do so alike each time, and never waits.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()  # libraries take their workspaces now: within a recording they must not
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class FusedDecoder:
    """Decodes ``count`` responses to each of ``B`` prompts, row by row of ``N = B count``.

    Args:
        policy: For which :func:`fits` is true; within :meth:`Policy.evaluating`.
        prompts: ``(B, P)``.
        preference: ``(B, K)``.
        count: Responses per prompt.
        max_new_tokens: ``T``.
        fixed: Attend to a cache of ``P + T`` places from the start, those not yet written hidden, and on a GPU replay
            each token from a CUDA graph. Otherwise the cache that is read grows with the response.
        layout: Of the policy, where it lasts for more than this.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Tokens,
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        fixed: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self.policy, self.fixed = policy, fixed
        self.records = fixed and policy.device.type == "cuda"
        self.replay: Callable[[], Tensor] | None = None
        body: Any = policy.body
        config: Any = policy.causal_lm.config
        self.rotary = body.rotary_emb
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.norm = config.rms_norm_eps, body.norm.weight
        self.embedding: Tensor = body.embed_tokens.weight
        width = prompts.ids.shape[1]
        rows = count * len(prompts.ids)  # N
        dtype = self.embedding.dtype
        self.layout = layout or Layout(policy, rows)
        gate = policy.gate_of(preference)
        gate = None if gate is None else gate.to(dtype)  # (B, R)
        self.gate = None if gate is None else gate.repeat_interleave(count, 0)  # (N, R)
        self.keys: list[Tensor] = []  # (N, groups, size, P + T) each; what is hidden is a number
        self.values: list[Tensor] = []  # (N, groups, P + T, size)
        self.first = self._read(prompts, gate, count, max_new_tokens).repeat_interleave(count, 0)  # (N, D)
        lengths = prompts.mask.sum(-1)  # (B,)
        positions = lengths.repeat_interleave(count).unsqueeze(1) + torch.arange(max_new_tokens, device=lengths.device)
        self.cos, self.sin = self._turns(positions)  # (N, T, 1, size)
        seen = F.pad(prompts.mask, (0, max_new_tokens)).repeat_interleave(count, 0)  # (N, P + T)
        bias = torch.zeros(seen.shape, dtype=dtype, device=lengths.device)
        self.bias = bias.masked_fill(~seen, torch.finfo(dtype).min)[:, None, None]  # (N, 1, 1, P + T)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=lengths.device)
        self.step = torch.zeros(1, dtype=torch.long, device=lengths.device)  # tensors, so that a recording reads them
        self.place = self.step + width
        self.end = width  # places that are written

    def start(self) -> Tensor:
        """Return logits of the first token of every row, ``(N, V)``."""
        return self._logits(self.first)

    def next(self, tokens: Tensor) -> Tensor:
        """Return logits of the token after ``tokens`` ``(N,)``, ``(N, V)``; valid until the next call."""
        self.tokens.copy_(tokens)
        self.end += 1
        if self.records:
            self.replay = self.replay or recorded(self._next)
            logits = self.replay()
        else:
            logits = self._next()
        self.step += 1
        self.place += 1
        return logits

    def _read(self, prompts: Tokens, gate: Tensor | None, count: int, max_new_tokens: int) -> Tensor:
        """Compute prompts, whose keys and values fill the caches of ``count`` responses, to last states ``(B, D)``."""
        width, groups = prompts.ids.shape[1], self.groups
        cos, sin = (x.flatten(0, 1) for x in self._turns((prompts.mask.long().cumsum(1) - 1).clamp(min=0)))
        gate = None if gate is None else gate.repeat_interleave(width, 0)  # (B P, R)
        # what pads is read by itself, so that its states are numbers
        seen = torch.ones(width, width, dtype=torch.bool, device=prompts.ids.device).tril() & prompts.mask.unsqueeze(1)
        seen |= torch.eye(width, dtype=torch.bool, device=seen.device)
        states = F.embedding(prompts.ids.flatten(), self.embedding)  # (B P, D)
        for layer in self.layout.layers:

            def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float = layer["scale"]) -> Tensor:
                # (B P, heads, size) -> (B, heads, P, size)
                queries, keys, values = (x.unflatten(0, (-1, width)).transpose(1, 2) for x in (queries, keys, values))
                self.keys.append(F.pad(keys.transpose(2, 3), (0, max_new_tokens)).repeat_interleave(count, 0))
                self.values.append(F.pad(values, (0, 0, 0, max_new_tokens)).repeat_interleave(count, 0))
                read = F.scaled_dot_product_attention(
                    queries, keys, values, seen.unsqueeze(1), scale=scale, enable_gqa=self.heads != groups
                )
                return read.transpose(1, 2).flatten(0, 1).flatten(1)

            states = self._layer(layer, states, cos, sin, gate, attend)
        last = states.unflatten(0, (-1, width))[:, -1]
        return F.rms_norm(last, last.shape[-1:], self.norm, self.eps)

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines by which states at positions ``(B, P)`` turn, ``(B, P, 1, size)``."""
        cos, sin = self.rotary(self.embedding[:1], positions)
        return cos.to(self.embedding.dtype).unsqueeze(2), sin.to(self.embedding.dtype).unsqueeze(2)

    def _next(self) -> Tensor:
        states = F.embedding(self.tokens, self.embedding)  # (N, D)
        cos, sin = (x.index_select(1, self.step).squeeze(1) for x in (self.cos, self.sin))  # (N, 1, size)
        self.bias.index_fill_(-1, self.place, 0)
        end = self.bias.shape[-1] if self.fixed else self.end
        bias = self.bias[..., :end]
        for i, layer in enumerate(self.layout.layers):

            def attend(queries: Tensor, keys: Tensor, values: Tensor, i: int = i, layer: Any = layer) -> Tensor:
                self.keys[i].index_copy_(-1, self.place, keys.unsqueeze(-1))
                self.values[i].index_copy_(2, self.place, values.unsqueeze(2))
                queries = queries.unflatten(1, (self.groups, -1)) * layer["scale"]  # (N, groups, heads / groups, size)
                weights = (queries @ self.keys[i][..., :end] + bias).softmax(-1)
                return (weights @ self.values[i][:, :, :end]).flatten(1)

            states = self._layer(layer, states, cos, sin, self.gate, attend)
        return self._logits(F.rms_norm(states, states.shape[-1:], self.norm, self.eps))

    def _layer(
        self,
        layer: dict[str, Any],
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        gate: Tensor | None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Compute a layer of the network.

        Args:
            layer: Of the layout.
            states: ``(N, D)``.
            cos: ``(N, 1, size)``, as ``sin``.
            sin: By which queries and keys are turned.
            gate: ``(N, R)``.
            attend: Of queries ``(N, heads, size)``, keys and values ``(N, groups, size)`` to ``(N, heads size)``.

        Returns:
            ``(N, D)``.
        """
        heads, groups = self.heads, self.groups
        read = layer["attention"](F.rms_norm(states, states.shape[-1:], layer["norm"], self.eps), gate)
        each = read.unflatten(1, (heads + 2 * groups, -1))  # (N, heads + 2 groups, size)
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
        read = attend(turned[:, :heads], turned[:, heads:], each[:, heads + groups :])
        states = states + layer["output"](read, gate)
        read = layer["up"](F.rms_norm(states, states.shape[-1:], layer["second_norm"], self.eps), gate)
        left, right = read.chunk(2, 1)
        return states + layer["down"](F.silu(left) * right, gate)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows ``(n,)`` alone."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.cos, self.sin, self.bias = self.cos[rows], self.sin[rows], self.bias[rows]
        self.tokens, self.replay = self.tokens[rows], None  # a recording is of the memory that was
        self.gate = None if self.gate is None else self.gate[rows]

    def join(self, other: FusedDecoder) -> None:
        """Go on with the rows of ``other``, too, which may be at another length; both have the same layout.

        The caches are moved so that what was written ends at the same place, and places that no row reads are let go.
        """
        both = (self, other)
        remaining = max(d._left for d in both)  # tokens that may come
        begins = [int((d.bias == 0).any(0).flatten().long().argmax()) for d in both]  # the first place that is read
        end = max(d.end - begin for d, begin in zip(both, begins, strict=True))

        def moved(tensors: Sequence[Tensor], dim: int, hidden: float = 0) -> Tensor:
            """Along ``dim``, the places."""
            found = []
            for d, begin, x in zip(both, begins, tensors, strict=True):
                written = x.narrow(dim, begin, d.end - begin)
                around = [end - written.shape[dim], remaining]
                found.append(F.pad(written, [0, 0] * (x.ndim - 1 - dim) + around, value=hidden))
            return torch.cat(found)

        def coming(tensors: Sequence[Tensor]) -> Tensor:
            """Return tensors of tokens that may come, along dimension 1."""
            found = [x[:, x.shape[1] - d._left :] for d, x in zip(both, tensors, strict=True)]
            return torch.cat([F.pad(x, (0, 0, 0, 0, 0, remaining - x.shape[1])) for x in found])

        self.cos, self.sin = coming([self.cos, other.cos]), coming([self.sin, other.sin])
        for i in range(len(self.keys)):
            self.keys[i] = moved([self.keys[i], other.keys[i]], 3)
            self.values[i] = moved([self.values[i], other.values[i]], 2)
        self.bias = moved([self.bias, other.bias], 3, torch.finfo(self.bias.dtype).min)
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.gate = None if self.gate is None or other.gate is None else torch.cat([self.gate, other.gate])
        self.step, self.place = torch.zeros_like(self.step), torch.full_like(self.place, end)
        self.end, self.replay = end, None

    @property
    def _left(self) -> int:
        return self.bias.shape[-1] - self.end

    def _logits(self, states: Tensor) -> Tensor:
        with self.policy.autocast():
            return self.policy.project(states, self.layout.head).float()


def _layer(layer: Any, rows: int, lasting: bool) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, f"{name}_norm", None) for name in "qk"]
    projection = partial(_Projection.of, rows=rows, lasting=lasting)
    return {
        "norm": layer.input_layernorm.weight,
        "second_norm": layer.post_attention_layernorm.weight,
        "query_norm": None if norms[0] is None else norms[0].weight,
        "key_norm": None if norms[1] is None else norms[1].weight,
        "scale": attention.scaling,
        "attention": projection([attention.q_proj, attention.k_proj, attention.v_proj]),
        "output": projection([attention.o_proj]),
        "up": projection([mlp.gate_proj, mlp.up_proj]),
        "down": projection([mlp.down_proj]),
    }
