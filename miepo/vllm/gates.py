"""The gate inside vLLM's LoRA layers: one adapter in memory, and for each token the gate of its request.

A gated adapter is ``delta W(w) = B diag(g(w)) A``: between the two products vLLM has the ``R`` coordinates of each
token in a buffer, which is multiplied by the gate of the token's request. This needs vLLM's own parts, which are named
here alone and have a contract test (``tests/integration/test_vllm_plugin.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miepo.vllm import cpu_products
from miepo.vllm.request import gate_in

SERIES = "0.32"  # of vLLM, whose parts these are

log = logging.getLogger("vllm.miepo")


def rank_gates(gates: Sequence[list[float] | None], ranks: Sequence[int], width: int) -> np.ndarray | None:
    """Return the gate of every rank for each of ``N`` requests, ``(N, width)`` float32; None where all are 1.

    Args:
        gates: The factor of each rank block of a request's adapter.
        ranks: The rank of each request's adapter, all blocks together; 0 of a request to the base, which gets zeros:
            on a CPU vLLM would take it for one with the last adapter.
        width: Ranks that vLLM has room for.
    """
    if all(gate is None for gate in gates) and len(set(map(bool, ranks))) < 2:
        return None
    found = np.ones((len(gates), width), np.float32)
    for row, gate, rank in zip(found, gates, ranks, strict=True):
        if not rank:
            row[:] = 0
        elif gate is not None:
            block = rank // len(gate)
            row[: block * len(gate)] = np.repeat(np.asarray(gate, np.float32), block)
    return found


class TokenGates:
    """The gate of every token in the batch that is computed, in a buffer that stays where it is.

    Args:
        tokens: Most in a batch.
        rank: ``R``, that vLLM has room for.
        device: Of the buffer.
    """

    def __init__(self, tokens: int, rank: int, device: Any) -> None:
        self.values = torch.ones(tokens, rank, device=device)
        self._dirty = 0  # leading rows that may differ from 1

    def set(self, gates: np.ndarray | None, tokens: Sequence[int]) -> None:
        """Take the gates of ``N`` requests, ``(N, R)``, that have so many tokens each in the batch."""
        if self._dirty:
            self.values[: self._dirty].fill_(1)
            self._dirty = 0
        if gates is not None:
            rows = torch.from_numpy(np.repeat(gates, tokens, 0))
            self._dirty = len(rows)
            self.values[: self._dirty].copy_(rows)

    def apply(self, buffer: Any) -> None:
        """Multiply the coordinates of each token, ``(.., tokens, R)`` or a tuple of ``(tokens, R)``, in place."""
        for part in [buffer] if isinstance(buffer, Tensor) else buffer:
            part.mul_(self.values[: part.shape[-2]])


def why_not(config: Any) -> str | None:
    """Return why a server with this configuration cannot apply gates, None where it can."""
    import vllm

    if not vllm.__version__.startswith(f"{SERIES}."):
        return f"expected vLLM {SERIES}, got {vllm.__version__}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if not any(entry.name == "miepo" for entry in entry_points(group="vllm.general_plugins")) or (
        allowed is not None and "miepo" not in allowed.split(",")
    ):
        return "expected miepo to be installed beside vLLM, and VLLM_PLUGINS to allow it"
    if config.lora_config is None:
        return "expected --enable-lora"
    if config.lora_config.fully_sharded_loras:
        return "expected a server without --fully-sharded-loras"
    if config.use_v2_model_runner:
        return "expected VLLM_USE_V2_MODEL_RUNNER=0 in the server's environment"
    return None


def install() -> None:
    """Let vLLM's LoRA layers apply gates, in this process; once is enough."""
    import vllm

    if not vllm.__version__.startswith(f"{SERIES}."):
        return
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if hasattr(PunicaWrapperBase, "miepo"):
        return
    try:
        kernels: Any = resolve_obj_by_qualname(current_platform.get_punica_wrapper())
    except NotImplementedError:  # a platform without LoRA
        return
    PunicaWrapperBase.miepo = True
    make, shrink, activate = kernels.__init__, kernels.add_shrink, LoRAModelRunnerMixin.set_active_loras

    def make_with_gates(self: Any, max_num_batched_tokens: int, *args: Any, **kwargs: Any) -> None:
        make(self, max_num_batched_tokens, *args, **kwargs)
        self.token_gates = TokenGates(max_num_batched_tokens, kwargs["lora_config"].max_lora_rank, self.device)

    def shrink_and_gate(self: Any, y: Any, x: Any, lora_a_stacked: Any, scale: float, **kwargs: Any) -> Any:
        found = shrink(self, y, x, lora_a_stacked, scale, **kwargs)
        self.token_gates.apply(y)
        return found

    def activate_with_gates(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        activate(self, input_batch, num_scheduled_tokens, *args, **kwargs)
        manager = self.lora_manager._adapter_manager
        asked = [self.requests[name] for name in input_batch.req_ids]
        gates = [_gate_of(request) for request in asked]
        adapters = [manager.get_adapter(r.lora_request.lora_int_id) if r.lora_request else None for r in asked]
        ranks = [adapter.rank if adapter else 0 for adapter in adapters]
        for wrapper in {id(w): w for w in manager.punica_wrapper_mapping.values()}.values():
            rows = rank_gates(gates, ranks, wrapper.token_gates.values.shape[1])
            wrapper.token_gates.set(rows, num_scheduled_tokens)

    kernels.__init__, kernels.add_shrink = make_with_gates, shrink_and_gate
    if kernels.__name__ == "PunicaWrapperCPU":
        cpu_products.install(kernels)
    LoRAModelRunnerMixin.set_active_loras = activate_with_gates


def _gate_of(request: Any) -> list[float] | None:
    parameters = request.sampling_params
    try:
        return gate_in(parameters.extra_args) if parameters is not None else None
    except ValueError as error:  # that no endpoint has refused: raised here it would end the server
        log.warning("the gate of a request is left out: %s", error)
        return None
