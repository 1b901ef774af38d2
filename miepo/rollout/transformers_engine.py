"""Sampling with the model that trains, through Transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miepo.policy import Policy
from miepo.rollout.engine import RolloutEngine, make_responses
from miepo.types import Responses


class TransformersEngine(RolloutEngine):
    """The default engine: no second copy of the model, works on every device."""

    def sample(
        self, policy: Policy, prompts: Sequence[str], preference: Tensor, count: int, max_new_tokens: int, seed: int
    ) -> Responses:
        tokens = policy.encode(prompts, preference)  # (N, P)
        stop = {"stop_strings": list(self.stop), "tokenizer": policy.tokenizer} if self.stop else {}
        devices = [policy.device] if policy.device.type == "cuda" else []
        with policy.evaluating(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            with policy.conditioned(preference.repeat_interleave(count, 0)):
                ids = policy.model.generate(
                    input_ids=tokens.ids,
                    attention_mask=tokens.mask.long(),
                    num_return_sequences=count,
                    max_new_tokens=max_new_tokens,
                    **stop,
                )  # (N * n, P + T)
        sampled = ids[:, tokens.ids.shape[1] :]
        return make_responses(policy, sampled.unflatten(0, (len(prompts), count)), self.stop)
