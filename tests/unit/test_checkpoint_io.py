"""Checkpoint files: whole or not there, small, of every schema there was."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from miepo.callbacks import RunCheckpoint
from miepo.errors import UserError
from miepo.training.checkpoint_io import DurableCheckpointIO, config_changes, read_checkpoint
from tests.helpers.fit import tiny_run

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("checkpoint_schema_*.ckpt"))


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = DurableCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"a": torch.ones(3)}, path)

    def half(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    io.save_checkpoint({"a": torch.zeros(3)}, path)  # and the next one goes through
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.zeros(3))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: os.replace(self, to))
    DurableCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert events == ["sync", "rename", "sync"]


def checkpoint(model: Path, root: Path, **settings: Any) -> tuple[Any, Path]:
    trainer, module, data = tiny_run(
        model, root, trainer={"enable_checkpointing": True, "callbacks": [RunCheckpoint()]}, **settings
    )
    trainer.fit(module, data)
    return module, root / "checkpoints" / "last.ckpt"


def test_it_is_as_large_as_the_adapter_and_its_optimiser(tiny_model: Path, tmp_path: Path) -> None:
    """Base weights, which would be many times as much, are not in it."""
    module, path = checkpoint(tiny_model, tmp_path, policy={"lora_rank": 512})
    adapter = sum(p.numel() * p.element_size() for p in module.policy.adapter_parameters().values())
    assert path.stat().st_size < 1.05 * 3 * adapter  # and two moments of Adam


def test_there_is_a_fixture_of_every_schema_before_this_one() -> None:
    from miepo.methods.base import SCHEMA

    assert [int(f.stem.rpartition("_")[2]) for f in FIXTURES] == list(range(1, SCHEMA))


@pytest.mark.parametrize("file", FIXTURES, ids=lambda f: f.stem)
def test_checkpoints_of_every_schema_stay_loadable(tiny_model: Path, tmp_path: Path, file: Path) -> None:
    """Training goes on from them: with their adapter, optimiser, normalisation and place."""
    saved = torch.load(file, weights_only=True)
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"max_steps": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another folder of the base, and of Lightning's callback that is not there
        trainer.fit(module, data, ckpt_path=file)
    assert trainer.global_step == 3
    for objective in module.objectives:
        state = saved["callbacks"][objective.state_key]
        assert objective.state_dict() | {"of": None} == state | {"of": None}  # which older ones do not tell


def test_a_schema_of_the_future_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    module, path = checkpoint(tiny_model, tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["miepo"]["schema"] += 1
    with pytest.raises(UserError, match=r"of schema \d or older, got \d: update miepo"):
        module.on_load_checkpoint(saved)


def test_what_two_configurations_differ_in() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None, "e": {"f": 1}}
    now = {"a": {"b": 2, "c": [1]}, "e": 3, "g": {"h": 1}}
    assert config_changes(before, now) == {"a.b": (1, 2), "e": ({"f": 1}, 3), "g": (None, {"h": 1})}


def _loops(**counts: Any) -> dict[str, Any]:
    """With ``counts`` of the current batch."""
    none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    return {
        "fit_loop": {
            "epoch_progress": {"total": none, "current": none},
            "epoch_loop.batch_progress": {"total": none, "current": none | counts, "is_last_batch": False},
        }
    }


def _whole() -> dict[str, Any]:
    entries = {"schema": 2, "objectives": ["a"], "base": "x", "policy": {}, "config": {}, "fingerprint": None}
    return {
        "state_dict": {"w": torch.zeros(2)},
        "pytorch-lightning_version": "2.6.0",
        "callbacks": {},
        "loops": _loops(),
        "optimizer_states": [],
        "lr_schedulers": [],
        "miepo": entries,
    }


BROKEN_LOOPS = [
    (_loops(processed="3"), "got one with loops.fit_loop.epoch_loop.batch_progress.current.processed of type str"),
    (_loops(ready=-1), "got one with loops.fit_loop.epoch_loop.batch_progress: .*-1"),
]
BROKEN: list[tuple[Any, str]] = [
    ([1, 2], "got a list"),
    (torch.zeros(2), "got a Tensor"),
    ({}, "got one without state_dict"),
    *(({key: None}, f"got one with {key} of type NoneType") for key in _whole()),
    ({"state_dict": {"w": 7}}, "got one whose weights are no tensors"),
    *(
        ({"miepo": _whole()["miepo"] | {key: value}}, said)
        for key, value, said in [
            ("schema", "x", "got one with miepo.schema of type str"),
            ("objectives", 3, "got one with miepo.objectives of type int"),
            ("objectives", [3], r"got one with objectives \[3\]"),
            ("policy", None, "got one with miepo.policy of type NoneType"),
            ("config", [1], "got one with miepo.config of type list"),
        ]
    ),
    ({"callbacks": {"Objective[a]": [1]}}, r"got one with callbacks.Objective\[a\] of type list"),
    ({"loops": {}}, "got one without loops.fit_loop"),
    *(({"loops": loops}, said) for loops, said in BROKEN_LOOPS),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_a_file_of_another_kind_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    whole = _whole()
    torch.save(whole, tmp_path / "whole")
    assert read_checkpoint(tmp_path / "whole", resume=True).keys() == whole.keys()
    torch.save(whole | change if isinstance(change, dict) and change else change, tmp_path / "broken")
    with pytest.raises(UserError, match=said):
        read_checkpoint(tmp_path / "broken", resume=True)


def test_weights_alone_are_read_but_are_no_run_to_go_on_with(tmp_path: Path) -> None:
    torch.save({k: v for k, v in _whole().items() if k not in ("optimizer_states", "lr_schedulers")}, tmp_path / "x")
    assert read_checkpoint(tmp_path / "x")["miepo"]["objectives"] == ["a"]
    with pytest.raises(UserError, match="got one without optimizer_states"):
        read_checkpoint(tmp_path / "x", resume=True)
