"""Sampling with the model that trains: no second copy of it, on every device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import StopStringCriteria

from miepo.errors import UserError
from miepo.policy import Policy
from miepo.rollout.engine import RolloutEngine, make_responses
from miepo.rollout.fused_decoder import FusedDecoder, fits
from miepo.types import Responses, Tokens

BLOCK = 256  # tokens


class TransformersEngine(RolloutEngine):
    """The default engine.

    Args:
        stop: See :class:`~miepo.rollout.engine.RolloutEngine`.
        fused: Decode Llama-like networks with :class:`~miepo.rollout.fused_decoder.FusedDecoder`, about twice as fast.
            Other networks, and all with ``fused: false``, take Transformers' ``generate``.
        cuda_graph: On a GPU, record a token of the fused decoder as a CUDA graph over a cache of fixed size: no Python
            between its kernels. On an H100 it draws the tokens of the plain decoder. It is off, since it was not timed.
    """

    def __init__(self, stop: Sequence[str] = (), fused: bool = True, cuda_graph: bool = False) -> None:
        super().__init__(stop)
        if cuda_graph and not fused:
            raise UserError("engine.cuda_graph records the fused decoder: expected engine.fused true, got false")
        self.fused, self.cuda_graph = fused, cuda_graph

    def draw(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> Responses:
        tokens = policy.encode(prompts, preference)  # (N, P)
        shards = policy.shards
        gathered = shards.gathered() if shards is not None and shards.gathers else nullcontext()
        whole = shards is None or shards.gathers
        with policy.evaluating(), gathered:
            sample = self._decode if self.fused and whole and fits(policy) else self._generate
            sampled = sample(policy, tokens, preference, count, max_new_tokens, seeds)
        return make_responses(policy, sampled.unflatten(0, (len(prompts), count)), self.stop)

    def _decode(
        self, policy: Policy, prompts: Tokens, preference: Tensor, count: int, max_new_tokens: int, seeds: Sequence[int]
    ) -> Tensor:
        fixed = self.cuda_graph and policy.device.type == "cuda"
        decoder = FusedDecoder(policy, prompts, preference.to(policy.device), count, max_new_tokens, fixed)
        stopped = StopStringCriteria(policy.tokenizer, list(self.stop)) if self.stop else None
        # drawn beforehand, so that what a row says does not depend on when others end
        draws = [
            torch.rand(count, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        uniform = torch.cat(draws).to(policy.device)  # (N * n, T)
        out = torch.full(uniform.shape, policy.end_id, device=policy.device)
        ends = torch.tensor(policy.end_ids, device=policy.device)
        rows = torch.arange(len(out), device=policy.device)  # of the decoder
        logits = decoder.start()
        for t in range(max_new_tokens):
            chosen = draw_tokens(
                logits if policy.temperature == 1 else logits / policy.temperature, uniform[rows, t]
            )  # (rows,)
            out[rows, t] = chosen
            done = torch.isin(out[rows, : t + 1], ends).any(-1)
            if stopped is not None:
                done |= stopped(out[rows, : t + 1], None).to(done.device)
            if t + 1 == max_new_tokens or done.all():
                break
            if 2 * int((~done).sum()) <= len(rows):  # leaving costs a copy of the cache
                active = (~done).nonzero().squeeze(1)
                decoder.keep(active)
                rows, chosen = rows[active], chosen[active]
            logits = decoder.next(chosen)
        if logits.isnan().any():
            raise UserError("the policy's logits are not numbers: expected a finite learning rate and finite weights")
        return out

    def _generate(
        self, policy: Policy, prompts: Tokens, preference: Tensor, count: int, max_new_tokens: int, seeds: Sequence[int]
    ) -> Tensor:
        stop: dict[str, Any] = {"stop_strings": list(self.stop), "tokenizer": policy.tokenizer} if self.stop else {}
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices), policy.conditioned(preference.repeat_interleave(count, 0)):
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))  # generate has one for all
            ids = policy.model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                num_return_sequences=count,
                max_new_tokens=max_new_tokens,
                synced_gpus=policy.shards is not None and not policy.shards.gathers,
                **stop,
            )  # (N * n, P + T)
        return ids[:, prompts.ids.shape[1] :]


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return tokens by inversion of the distribution function: ``(N, V)`` float32, ``(N,)`` float64 ``-> (N,)``.

    In two levels, blocks and then the tokens of one block: sums of all tokens in float64 would cost as much as a third
    of the network.
    """
    mass = (logits - logits.amax(-1, keepdim=True)).exp_()
    mass = F.pad(mass, (0, -mass.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # (N, V / BLOCK, BLOCK)
    blocks = mass.sum(-1).double().cumsum(-1)  # (N, V / BLOCK)
    block, rest = _invert(blocks, uniform.unsqueeze(1) * blocks[:, -1:])
    inside = mass.take_along_dim(block.unsqueeze(2), 1).squeeze(1).double().cumsum(-1)  # (N, BLOCK)
    token, _ = _invert(inside, rest)
    return (block * BLOCK + token).squeeze(1).clamp(max=logits.shape[1] - 1)  # of NaN, beyond all


def _invert(cumulative: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Return where ``height`` ``(N, 1)`` falls in ``cumulative`` ``(N, n)``, and how far above what comes before."""
    height = torch.minimum(height, cumulative[:, -1:].nextafter(torch.zeros_like(height)))  # never beyond the end
    index = torch.searchsorted(cumulative, height, right=True).clamp(max=cumulative.shape[1] - 1)  # of NaN, beyond all
    before = F.pad(cumulative, (1, 0)).gather(1, index)
    return index, height - before
