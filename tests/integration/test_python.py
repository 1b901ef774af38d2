"""Runs made in Python, without the command: their checkpoints serve as those of the command do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import miepo
from miepo import MIEPO, GatedConditioning, OnlinePreferenceDataModule, Policy
from miepo.callbacks import EvaluationRecord, ParetoFront, RunCheckpoint, Steerability
from miepo.cli import main
from miepo.data.rollout import RolloutSettings, roll_out
from miepo.errors import UserError
from miepo.exploration import InfoNCE
from miepo.objectives import Brevity, CheerfulWords
from miepo.training.loggers import CSVLogger
from miepo.training.run_checkpoint import Interrupted
from miepo.types import PromptBatch

PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes"]
NORMALISATION = {"mean": 0.0, "sd": 2.0}


def objectives() -> list[Any]:
    return [CheerfulWords(name="cheerfulness", normalisation=NORMALISATION), Brevity(40, normalisation=NORMALISATION)]


def policy(model: Path) -> Policy:
    seed_everything(7)  # by which the adapter is drawn
    return Policy(str(model), [GatedConditioning(shared=False)], lora_rank=2, lora_alpha=4, dtype="float32")


def trainer(folder: Path, *callbacks: Callback, steps: int = 4, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, logger=CSVLogger(str(folder), name="run", version=0),
        callbacks=[*objectives(), *callbacks], enable_progress_bar=False, log_every_n_steps=1, num_sanity_val_steps=0,
        **settings,
    )  # fmt: skip


def data() -> OnlinePreferenceDataModule:
    return OnlinePreferenceDataModule(PROMPTS, PROMPTS[:2], batch_size=2, max_new_tokens=6, grid=3, seed=5)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    callbacks = [RunCheckpoint(), EvaluationRecord(), ParetoFront(draw=False), Steerability()]
    trainer(folder, *callbacks).fit(MIEPO(policy(tiny_model), exploration=InfoNCE(0.003), learning_rate=1e-2), data())
    return folder / "run/version_0"


def test_its_checkpoint_is_loaded_and_answers(run: Path) -> None:
    trained = miepo.load(run)
    assert trained.names == ("cheerfulness", "brevity")
    answer = trained.generate("the garden", {"brevity": 1.0}, seed=1)
    assert isinstance(answer, str)
    assert set(trained.score(["the garden"], [answer])) == {"cheerfulness", "brevity"}  # objectives are built, too
    assert trained.saved.max_new_tokens == 6
    assert trained.front is not None
    assert trained.front.means.shape == (3, 2)
    assert trained.saved.settings["method"].endswith("MIEPO")
    assert trained.saved.settings["data"]["prompts"] == "6 prompts"
    assert trained.saved.settings["model"]["exploration"]["init_args"]["beta_w"] == 0.003


def test_it_is_exported_and_read_back(run: Path, tmp_path: Path) -> None:
    main(["export", "--ckpt_path", str(run), "--out", str(tmp_path / "adapter")])
    exported, trained = miepo.load(tmp_path / "adapter"), miepo.load(run)
    for seed in range(3):
        preference = {"cheerfulness": 0.5, "brevity": 0.5}
        assert exported.generate("food", preference, seed=seed) == trained.generate("food", preference, seed=seed)


def test_it_is_reported(run: Path, tmp_path: Path) -> None:
    main(["report", str(run), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "cheerfulness" in page
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == 1e-2
    assert config["trainer"]["max_steps"] == 4


def test_the_configuration_that_it_keeps_is_one_for_the_command(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Apart from prompts that were given as a list, it can be run as it is, and goes on from the checkpoint."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"] |= {"prompts": PROMPTS, "validation_prompts": PROMPTS[:2]}
    config["trainer"] |= {"max_steps": 5, "accelerator": "cpu", "default_root_dir": str(tmp_path), "logger": False}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "again.yaml"), "--ckpt_path", str(run)])
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_a_run_goes_on_in_python(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """As one that was not stopped: the same weights."""
    whole = MIEPO(policy(tiny_model), exploration=InfoNCE(0.003), learning_rate=1e-2, warmup=0.0)
    trainer(tmp_path / "whole", RunCheckpoint(), steps=4, limit_val_batches=0).fit(whole, data())
    half = MIEPO(policy(tiny_model), exploration=InfoNCE(0.003), learning_rate=1e-2, warmup=0.0)
    stopped = trainer(tmp_path / "half", RunCheckpoint(every_n_steps=1), StopAt(2), steps=4, limit_val_batches=0)
    with pytest.raises(Interrupted):
        stopped.fit(half, data())
    rest = MIEPO(policy(tiny_model), exploration=InfoNCE(0.003), learning_rate=1e-2, warmup=0.0)
    path = tmp_path / "half/run/version_0/checkpoints/last.ckpt"
    goes_on = trainer(tmp_path / "rest", RunCheckpoint(), steps=4, limit_val_batches=0)
    goes_on.fit(rest, data(), ckpt_path=path, weights_only=True)
    for name, parameter in whole.policy.adapter_parameters().items():
        assert torch.equal(parameter, rest.policy.adapter_parameters()[name]), name


def test_without_the_run_checkpoint_lightnings_own_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    trainer(tmp_path, steps=2, limit_val_batches=0).fit(MIEPO(policy(tiny_model)), data())
    assert not (tmp_path / "run/version_0/checkpoints/last.ckpt").exists()
    assert miepo.load(tmp_path / "run/version_0").names == ("cheerfulness", "brevity")


class StopAt(Callback):
    """Asks its own process to stop when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class OwnPrompts(LightningDataModule):
    """A user's: a loader of prompts, whose batches become rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = RolloutSettings(max_new_tokens=6)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(PROMPTS, batch_size=2, collate_fn=list)

    def on_after_batch_transfer(self, batch: list[str], dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        step = trainer.global_step
        places = PromptBatch(batch, [step] * len(batch), range(len(batch)))
        return roll_out(places, trainer.lightning_module.learner, self.settings)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_data_without_rollouts_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    class Plain(OwnPrompts):
        def on_after_batch_transfer(self, batch: list[str], dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(UserError, match="expected batches PreferenceBatch, got list"):
        trainer(tmp_path, limit_val_batches=0).fit(MIEPO(policy(tiny_model)), Plain())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_users_own_data_module_gets_checkpoints_and_stops(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_steps=2)
    saved: list[int] = []
    save = checkpoint.save
    checkpoint.save = lambda trainer: (saved.append(trainer.global_step), save(trainer))[1]  # type: ignore[method-assign]
    mine = trainer(tmp_path, checkpoint, StopAt(5), steps=8, max_epochs=-1, limit_val_batches=0)
    with pytest.raises(Interrupted):
        mine.fit(MIEPO(policy(tiny_model)), OwnPrompts())
    assert saved == [2, 4, 5]
    assert miepo.load(tmp_path / "run/version_0").names == ("cheerfulness", "brevity")
