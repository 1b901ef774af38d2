"""Whole runs on a pretended GPU: nothing that is on it meets what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from miepo import callbacks
from miepo.exploration import InfoNCE, Matching, PairwiseInformation
from miepo.methods import RewardsInContext, RewardsInContextDataModule, TargetConditioning
from miepo.objectives import ScoreModel
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.trained.build import build_policy
from miepo.trained.policy import TrainedPolicy
from tests.helpers.fit import MEASURES, PROMPTS, tiny_run
from tests.helpers.pretended_gpu import GPU, OnGpu, pretended_gpu, pretended_trainer
from tests.helpers.tiny import Length, save_tiny_scorer
from tests.helpers.trained import saved_policy
from tools.study.record import Record


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretended_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="at least two devices"):
            there + here
        with pytest.raises(RuntimeError, match="indices should be"):
            here[torch.tensor([0], device="cuda")]
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        assert (there + here.cuda()).device == (there[torch.tensor([0])] + 1).device == torch.device("cuda:0")
        assert (there.cpu() + here).device == torch.device("cpu")
        with torch.device("cuda"):
            assert torch.zeros(2).device.type == "cuda"
            with pytest.raises(RuntimeError, match="for generator"):
                torch.randn(2, generator=torch.Generator())


def test_a_module_moves_learns_and_refuses_what_is_elsewhere() -> None:
    with pretended_gpu():
        layer = nn.Linear(3, 1).to("cuda")
        before = layer.weight.detach().clone()
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(torch.ones(2, 3, device="cuda")).sum().backward()
        optimiser.step()
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.weight, OnGpu)
        assert not torch.equal(layer.weight, before)
        with pytest.raises(RuntimeError, match="at least two devices"):
            layer(torch.ones(2, 3))


class Where(Callback):
    """Notes on which devices the policy, what it learns from and its loss are."""

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.evaluated: set[str] = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.trained |= {pl_module.policy.device.type, batch.scores.device.type, outputs["loss"].device.type}

    def on_validation_end(self, trainer, pl_module) -> None:
        self.evaluated.add(pl_module.policy.device.type)


SCORER = object()  # stands for a model in a folder that a test has to make
RUNS: dict[str, dict[str, Any]] = {
    "gated, reward model": {"objectives": SCORER},
    "prompt, one anchor": {
        "conditioning": [PromptConditioning()],
        "module": {"exploration": InfoNCE(0.1, anchors=1)},
    },
    "matching of six responses": {
        "conditioning": [GatedConditioning(shared=False), PromptConditioning()],
        "module": {"exploration": Matching(1.0, reuse=1.0)},
        "data": {"responses": 6, "feedback": "scalarised", "missing_eos_penalty": 1.0},
    },
    "a trunk": {
        "module": {"exploration": InfoNCE(0.1)},
        "policy": {"lora_layers": 1},
    },
    "information, generate, dropout": {
        "module": {"exploration": PairwiseInformation()},
        "data": {"engine": TransformersEngine(fused=False)},
        "policy": {"lora_dropout": 0.1},
    },
    "RiC": {"conditioning": [TargetConditioning()], "method": RewardsInContext},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run(tiny_model: Path, tmp_path: Path, run: dict[str, Any]) -> None:
    """With every callback that measures, and what a study keeps: an evaluation before, four steps, one after."""
    where = Where()
    if run.get("objectives") is SCORER:
        run = run | {"objectives": [ScoreModel(str(save_tiny_scorer(tmp_path / "scorer")), "score"), Length()]}
    measures = [getattr(callbacks, name)() for name in MEASURES]
    with pretended_gpu():
        trainer, module, data = tiny_run(
            tiny_model,
            tmp_path,
            trainer=pretended_trainer()
            | {"limit_val_batches": 1.0, "max_steps": 4, "num_sanity_val_steps": -1}
            | {"callbacks": [where, *measures, Record(str(tmp_path / "record"))]},
            **run,
        )
        if "method" in run:
            data = RewardsInContextDataModule(
                prompts=PROMPTS * 2, validation_prompts=["the rain", "a garden"], batch_size=4, max_new_tokens=6
            )
        trainer.fit(module, data)
    assert where.trained == where.evaluated == {"cuda"}
    assert (tmp_path / "record" / "result.json").is_file()


def test_a_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    where = Where()
    with pretended_gpu():
        for steps, checkpoint in ((1, None), (2, tmp_path / "last.ckpt")):
            settings = {"max_steps": steps, "enable_checkpointing": True, "limit_val_batches": 1.0}
            kept = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
            measures = [kept, callbacks.Steerability(), callbacks.PreferenceInformation(), callbacks.CollapseGuard()]
            trainer, module, data = tiny_run(
                tiny_model, tmp_path, trainer=pretended_trainer() | settings | {"callbacks": [where, *measures]}
            )
            trainer.fit(module, data, ckpt_path=checkpoint)
    assert trainer.global_step == 2
    assert where.trained == where.evaluated == {"cuda"}


@pytest.mark.parametrize("way", [GatedConditioning, PromptConditioning])
def test_a_saved_policy_answers_streams_and_scores(tiny_model: Path, way: Any) -> None:
    with pretended_gpu():
        saved, _ = saved_policy(tiny_model, [way()])
        policy = build_policy(saved, {}, trust=True, device=GPU).to(GPU).eval()
        assert policy.device == GPU
        trained = TrainedPolicy(saved, policy, GPU, None, trust=True)
        answer = trained.generate("the rain", {"brevity": 1.0}, seed=3)
        assert "".join(trained.stream("the rain", {"brevity": 1.0}, seed=3)) == answer
        assert list(trained.score("the rain", "a tree")) == ["letter_e", "brevity"]
