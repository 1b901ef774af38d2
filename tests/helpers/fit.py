"""Runs of the whole framework on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from miepo import MIEPO, OnlinePreferenceDataModule
from miepo.objectives import Objective
from miepo.policy import Conditioning, GatedConditioning, Policy
from miepo.types import PreferenceBatch
from tests.helpers.tiny import Length, Letters

MEASURES = (
    "Steerability", "ParetoFront", "PreferenceInformation", "EvaluationTable", "SampleTable", "Throughput", "CollapseGuard",
)  # fmt: skip
PROMPTS = [
    "the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food", "it is good",
]  # fmt: skip


def tiny_run(
    model: Path,
    root: Path,
    *,
    conditioning: Sequence[Conditioning] | None = None,
    objectives: Sequence[Objective] | None = None,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    method: type[Any] = MIEPO,
) -> tuple[Trainer, Any, OnlinePreferenceDataModule]:
    """A trainer, a module and a datamodule that fit together; any setting can be replaced."""
    settings = {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "dtype": "float32"} | (policy or {})
    built = Policy(str(model), list(conditioning or [GatedConditioning()]), **settings)
    objectives = [Letters("e"), Length()] if objectives is None else list(objectives)
    values = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    values |= {"enable_model_summary": False, "default_root_dir": root, "max_steps": 2, "log_every_n_steps": 1}
    values |= {"num_sanity_val_steps": 0, "limit_val_batches": 0} | (trainer or {})
    values["callbacks"] = [*values.get("callbacks", []), *objectives]
    settings = {"learning_rate": 1e-2} | (module or {})
    rollouts = {"validation_prompts": ["the rain", "a garden"], "batch_size": 4, "max_new_tokens": 6, "normalise_on": 4}
    rollouts = {"prompts": PROMPTS} | rollouts | (data or {})
    return Trainer(**values), method(built, **settings), OnlinePreferenceDataModule(**rollouts)


class Batches(Callback):
    """Keeps the batches, what was logged for them, and the adapter before each step."""

    def __init__(self) -> None:
        self.batches: list[PreferenceBatch] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(batch)
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def rollout(model: Path, root: Path, **kwargs) -> tuple[MIEPO, PreferenceBatch, dict[str, float]]:
    batches = Batches()
    kwargs.setdefault("trainer", {})
    kwargs["trainer"] = {"callbacks": [batches], "max_steps": 1} | kwargs["trainer"]
    trainer, module, data = tiny_run(model, root, **kwargs)
    trainer.fit(module, data)
    return module, batches.batches[0], batches.logged[0]


def step(module: MIEPO, batch: PreferenceBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step on a given batch, without logging."""
    module.log_terms = lambda *_: None
    module.zero_grad()
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.policy.adapter_parameters().items()}  # fmt: skip
    return loss.detach(), gradients
