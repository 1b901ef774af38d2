"""Runs that are stopped, and what two runs have in common."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback

from miepo.objectives import Objective

TIMES = ("time/", "tokens_per_second/", "memory/")  # the only figures that may differ


class StopAt(Callback):
    """Sends this process a signal at a moment of the run that a test chooses."""

    moment: ClassVar[tuple[str, int, int] | None] = None  # hook, optimiser steps by then, number of the signal

    def _at(self, hook: str, trainer: Any) -> None:
        if StopAt.moment is not None and StopAt.moment[:2] == (hook, trainer.global_step):
            number, StopAt.moment = StopAt.moment[2], None
            os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        self._at("on_train_batch_start", trainer)

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        self._at("on_train_batch_end", trainer)

    def on_validation_batch_end(self, trainer, *_: Any) -> None:
        self._at("on_validation_batch_end", trainer)


class StopsOnOne(Callback):
    """Sends the second process SIGTERM after the first step."""

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class DiesOnce(Callback):
    """Kills the second process after the third step, once, and writes down from which step training began.

    Args:
        marks: The file.
    """

    def __init__(self, marks: str) -> None:
        self.marks = Path(marks)

    def _mark(self, text: str) -> None:
        with self.marks.open("a") as file:
            file.write(text + "\n")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._mark(f"begins {trainer.global_step}")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        dead = self.marks.exists() and "dies" in self.marks.read_text()
        if trainer.global_rank == 1 and trainer.global_step == 3 and not dead:
            time.sleep(1)  # Ray asks for reports five times a second
            self._mark("dies 3")
            os.kill(os.getpid(), signal.SIGKILL)


class FailsOnOne(Objective):
    """Raises on the second process when it is asked for the second time."""

    def __init__(self) -> None:
        super().__init__("unlucky", {"mean": 0.0, "sd": 1.0})
        self.calls = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        self.calls += len(prompts) > 2  # the trial when it is loaded is of two
        if self.calls == 2 and os.environ.get("RANK") == "1":
            raise ValueError("the reward server is on fire")
        return [float(len(r)) for r in responses]


class DiffersByProcess(Objective):
    """Says something else on every process, as a server may."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [len(r) * (1.0 + int(os.environ.get("RANK", "0"))) for r in responses]


class TellsNormalisation(Callback):
    """Prints by what this process normalises."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = [o.normalisation for o in pl_module.objectives]
        print(f"process {trainer.global_rank} has {found}", flush=True)


def logged(run: Path) -> list[dict[str, str]]:
    """Rows of the CSV log, without times and without cells that are empty."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith(TIMES)} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def kept(run: Path) -> dict[str, Any]:
    """What a run's last checkpoint holds, but for where it lies."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if not k.startswith("RunCheckpoint")}
    del saved["loops"], saved["miepo"]
    return saved


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


SIGTERM, SIGINT, SIGUSR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
