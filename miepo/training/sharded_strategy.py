"""How a run is spread over devices, beyond the strategies that Lightning has."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor

from miepo.policy import Policy


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for a frozen base with an adapter: ``trainer.strategy: sharded``.

    The layers of the base are sharded over all processes (:class:`~miepo.policy.sharding.Shards`). The adapter is on
    each of them, its gradients are averaged as in DDP, and checkpoints are those of one process.

    Args:
        gather_for_rollout: Gather the whole base for as long as a rollout lasts. Without it a rollout needs no more
            memory than a layer, but gathers each layer for each token.
        kwargs: Of Lightning's ``ModelParallelStrategy``.
    """

    # an adapter and its moments are whole and few: nothing of them is gathered or written in parts
    restore_checkpoint_after_setup = ParallelStrategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint

    def __init__(self, gather_for_rollout: bool = True, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, **kwargs)
        self.gather_for_rollout = gather_for_rollout

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def shard(self, policy: Policy) -> None:
        """Shard a policy that has just been built."""
        policy.shard(self.device_mesh["data_parallel"], self.gather_for_rollout)

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        for parameter in self._trained():  # each process has drawn its own
            torch.distributed.broadcast(parameter.data, 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradient over all processes; of accumulated ones what was averaged before stays as it is."""
        super().post_backward(closure_loss)
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        mean = torch.cat([g.flatten() for g in gradients])  # one exchange for all
        torch.distributed.all_reduce(mean)
        mean /= self.world_size
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.lightning_module is not None
        return [p for p in self.lightning_module.parameters() if p.requires_grad]


StrategyRegistry.register("sharded", ShardedStrategy, description=ShardedStrategy.__doc__)
