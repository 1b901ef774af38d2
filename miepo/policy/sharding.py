"""A base network spread over the processes, layer by layer (FSDP2), for one that does not fit a device.

The base is frozen: it is gathered to be read, and has no gradient. The adapter, which trains, stays whole everywhere:
its optimiser, its checkpoints and everything that reads it are what they are without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from miepo.errors import UserError


class Shards:
    """The layers of a network, each process holding its part of every weight.

    A layer is gathered for as long as it computes. Whoever runs the network must therefore do so as often as the other
    processes do.

    Args:
        network: The Hugging Face model whose layers are sharded; embeddings and head stay whole.
        mesh: The processes.
        whole: Parameters that are not sharded.
        gathers: Whether responses are sampled with all layers gathered for as long as a rollout lasts, so that each
            process samples at its own pace; otherwise a layer is gathered for every token.

    Raises:
        UserError: the network does not say what its layers are.
    """

    def __init__(self, network: Any, mesh: DeviceMesh, whole: Iterable[nn.Parameter], gathers: bool) -> None:
        self.gathers, self._mesh = gathers, mesh
        kinds = set(getattr(network, "_no_split_modules", None) or [])
        self._layers: list[Any] = [module for module in network.modules() if type(module).__name__ in kinds]
        if not self._layers:
            raise UserError(f"{type(network).__name__} does not say what its layers are, so that none can be sharded")
        remaining = set(whole)
        for layer in self._layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=remaining)
        # holds nothing of its own: with it the layers know one another, and the next is gathered while one computes
        body = getattr(network, network.base_model_prefix)
        remaining |= set(body.parameters()) - {p for layer in self._layers for p in layer.parameters()}
        fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=remaining)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it every process has all layers and computes without waiting for the others."""
        layers: list[FSDPModule] = self._layers
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True)
                layer.reshard()

    def most(self, number: int) -> int:
        """Return the largest ``number`` that any process has."""
        largest = torch.tensor(number, device=self._mesh.device_type)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._mesh.get_group())
        return int(largest)
