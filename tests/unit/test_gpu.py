"""What a GPU computes, against the same on a CPU; skipped where there is none."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from miepo.exploration import InfoNCE, Matching
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.rollout.fused_decoder import FusedDecoder
from tests.helpers.fit import rollout, step, tiny_run
from tests.helpers.tiny import randomise_adapter, tiny_policy
from tests.unit.test_fused_decoder import PROMPTS, W, expected_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WAYS = {"gated": GatedConditioning, "prompt": PromptConditioning}


def moved(value: Any, device: str) -> Any:
    """The tensors of a record of :mod:`miepo.types`, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("term", [InfoNCE(0.1), Matching(1.0, reuse=1.0)], ids=["infonce", "matching"])
def test_loss_and_gradients_of_a_step(tiny_model: Path, tmp_path: Path, way: str, term: Any) -> None:
    module, batch, _ = rollout(tiny_model, tmp_path, conditioning=[WAYS[way]()], module={"exploration": term})
    loss, gradients = step(module, batch)
    module.to("cuda")
    there, others = step(module, moved(batch, "cuda"))
    torch.testing.assert_close(there.cpu(), loss, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name].cpu(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", [False, True])  # True records a token as a CUDA graph
def test_logits_of_the_decoder(tiny_model: Path, way: str, fixed: bool) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [WAYS[way]()]))
    rows = torch.randint(5, 100, (4, 5), generator=torch.Generator().manual_seed(0))  # two responses per prompt
    with policy.evaluating():
        expected = expected_logits(policy, [p for p in PROMPTS for _ in range(2)], W.repeat_interleave(2, 0), rows)
    policy.to("cuda")
    with policy.evaluating():
        there = rows.cuda()
        decoder = FusedDecoder(policy, policy.encode(PROMPTS, W.cuda()), W.cuda(), 2, 6, fixed)
        assert decoder.records == fixed
        logits = [decoder.start().clone(), *(decoder.next(there[:, t]).clone() for t in range(2))]
        decoder.keep(torch.tensor([3, 0], device="cuda"))
        later = [decoder.next(there[[3, 0], t]).clone() for t in range(2, 4)]
    torch.testing.assert_close(torch.stack(logits, 1).cpu(), expected[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.stack(later, 1).cpu(), expected[[3, 0], 3:5], rtol=1e-3, atol=1e-3)


def test_a_recording_samples_the_same_tokens(tiny_model: Path) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()])).to("cuda")
    plain, graph = (
        TransformersEngine(cuda_graph=on).sample(policy, PROMPTS, W.cuda(), 8, 24, 3).tokens.ids for on in (False, True)
    )
    assert torch.equal(plain, graph)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_run(tiny_model: Path, tmp_path: Path, dtype: str, cuda_graph: bool) -> None:
    """Rollouts, steps and an evaluation."""
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, policy={"dtype": dtype}, data={"engine": TransformersEngine(cuda_graph=cuda_graph)},
        trainer={"accelerator": "gpu", "devices": 1, "limit_val_batches": 1.0, "max_steps": 3},
    )  # fmt: skip
    where: list[str] = []
    trainer.callbacks.append(LambdaCallback(on_train_batch_end=lambda t, m, *_: where.append(m.policy.device.type)))
    trainer.fit(module, data)
    assert where == ["cuda"] * 3
    assert module.policy.weight_dtype == getattr(torch, dtype)
    assert torch.isfinite(trainer.callback_metrics["loss"])
    assert all(torch.isfinite(p).all() for p in module.policy.adapter_parameters().values())
