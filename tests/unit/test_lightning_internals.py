"""A contract for every private name of Lightning: where a release changes one, this fails and says which."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

import miepo
from miepo.training import lightning_internals as internals

PACKAGE = Path(miepo.__file__).parent


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in internals.OVERRIDDEN.items() for name in names]
)
def test_an_overridden_method_is_there(kind: type, name: str) -> None:
    assert callable(getattr(kind, name))
    assert next(iter(inspect.signature(getattr(kind, name)).parameters)) == "self"


def test_overridden_methods_take_what_ours_take() -> None:
    assert list(inspect.signature(LightningCLI._instantiate_trainer).parameters) == ["self", "config", "callbacks"]
    assert list(inspect.signature(LightningCLI._run_subcommand).parameters) == ["self", "subcommand"]
    writer = next(kind for kind in internals.OVERRIDDEN if kind.__name__ == "_ExperimentWriter")
    assert list(inspect.signature(writer._rewrite_with_new_header).parameters) == ["self", "fieldnames"]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in internals.ATTRIBUTES.items() for name in names]
)
def test_an_attribute_is_set_by_the_class(kind: type, name: str) -> None:
    assert f"self.{name}" in inspect.getsource(kind)


class Nothing(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def test_the_loop_has_what_is_set_and_asked() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    assert trainer.fit_loop._restarting is False  # and restarting of the loop below has a setter
    trainer.fit_loop._restarting = True
    internals.forget_restart(trainer)
    assert not trainer.fit_loop._restarting
    assert not trainer.fit_loop.epoch_loop.restarting
    trainer.fit_loop.epoch_loop._batches_that_stepped = 7
    internals.count_steps_as_logged(trainer)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step == 0
    assert list(inspect.signature(trainer.fit_loop.epoch_loop._should_accumulate).parameters) == []


def test_no_other_file_takes_private_names_of_the_loops() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.name == "lightning_internals.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner.endswith(("_loop", "trainer", "epoch_loop", "progress")):
                    found.append(f"{file.name}:{node.lineno} {owner}.{node.attr}")
    assert [entry for entry in found if "self._trainer" not in entry] == []
