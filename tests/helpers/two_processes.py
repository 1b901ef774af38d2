"""Started by torchrun: a sharded policy samples where the prompts of one process end at once and those of the other never.

Prints the most tokens of a response on every process, and how far the responses are from those of the whole network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from miepo.policy import GatedConditioning
from miepo.rollout import TransformersEngine
from tests.helpers.tiny import randomise_adapter, tiny_policy


def main(model: Path, gather: bool) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    policy = randomise_adapter(tiny_policy(model, [GatedConditioning()]))
    ends = list(range(len(policy.tokenizer))) if rank else [10**6]
    policy.end_ids = policy.causal_lm.generation_config.eos_token_id = ends
    engine = TransformersEngine(fused=gather)

    def lengths() -> tuple[list[str], int]:
        preference = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
        responses = engine.sample(policy, ["the garden", "rain"], preference, 2, 40, 0)
        return [text for row in responses.texts for text in row], int(responses.tokens.mask.sum(-1).max())

    before = lengths()
    policy.shard(init_device_mesh("cpu", (2,)), gather)
    same = lengths() == before
    layers = [p for p in policy.body.layers.parameters() if not p.requires_grad]
    held = sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers)
    print(f"process {rank}: {before[1]} tokens, same {same}, {held:.2f} of the layers", flush=True)
    torch.distributed.barrier()  # or who is done first takes the connections from under the other
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "gather")
