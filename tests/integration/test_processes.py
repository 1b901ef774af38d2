"""Two processes on one machine, started by torchrun, against one with a batch twice as large."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.interruption import logged
from tests.integration.test_cli import callbacks, config, run

ROOT = Path(__file__).parents[2]
PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food"]
PROMPTS += ["it is good", "rain in spring", "people grow food"]


def values_of(model: Path, root: Path, batch_size: int, **changes: Any) -> dict:
    values = config(model, root, **changes)
    values["trainer"] |= {"max_epochs": 2, "gradient_clip_val": 1.0}
    values["trainer"]["callbacks"] = callbacks()
    # 3 prompts x 3 vectors do not divide by two: the shares of an evaluation are uneven
    values["data"] |= {"prompts": PROMPTS, "batch_size": batch_size, "evaluation_batch_size": 4}
    values["model"]["policy"]["init_args"]["lora_dropout"] = 0.0  # is of each process
    return values


def torchrun(values: dict, root: Path, *args: str, limit: float = 120) -> tuple[int, str, float]:
    """Exit status, what was printed, and seconds."""
    file = root / "two.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "miepo"]
    command += ["fit", "--config", str(file), "--trainer.devices", "2", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
    )
    return ended.returncode, ended.stdout, time.monotonic() - start


def assert_alike(two: Path, one: Path) -> None:
    """Every logged figure and every weight, up to the order of sums."""
    rows, expected = logged(two), logged(one)
    assert [r.keys() for r in rows] == [r.keys() for r in expected]
    for row, other in zip(rows, expected, strict=True):
        first = row["step"] == "0"  # rounding, which sums in another order differ by, grows from step to step
        for key in row:
            value = pytest.approx(
                float(other[key]), rel=1e-5 if first else 1e-3, abs=1e-5 if first else 1e-3, nan_ok=True
            )
            assert float(row[key]) == value, (key, row["step"])
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (two, one))
    for name, weight in b["state_dict"].items():
        torch.testing.assert_close(a["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    assert a["OnlinePreferenceDataModule"] == b["OnlinePreferenceDataModule"]  # responses scored


def test_ddp_is_one_process_with_the_batch_of_both(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run("fit", values_of(tiny_model, tmp_path / "one", 4), tmp_path / "one")
    status, said, _ = torchrun(
        values_of(tiny_model, tmp_path / "two", 2), tmp_path / "two", "--trainer.strategy", "ddp"
    )
    assert status == 0, said
    assert_alike(tmp_path / "two/run/version_0", tmp_path / "one/run/version_0")


def test_what_fails_on_one_process_ends_all_with_that_error(tiny_model: Path, tmp_path: Path) -> None:
    values = values_of(tiny_model, tmp_path, 2)
    values["objectives"][0] = {"class_path": "tests.helpers.interruption.FailsOnOne"}
    values["trainer"] |= {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    status, said, seconds = torchrun(values, tmp_path, "--trainer.strategy", "ddp")
    assert status != 0
    assert seconds < 60
    cause = "objective unlucky failed to score: ValueError: the reward server is on fire"
    assert said.count(f"miepo: error: {cause}") == 1  # the process where it happened
    assert "miepo: error: another process ended" in said  # and the one that would have waited
