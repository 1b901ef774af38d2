"""Runs that are killed again and again end as runs that were not: ``python -m tools.kill_runs``.

A tiny model is trained by the real command in processes that get SIGKILL: at random times, and at moments that random
times seldom hit, from within. Each is started again with ``--ckpt_path last``. At the end the adapter, the optimiser,
the normalisations and every logged figure but times are compared, bit for bit, with a run that no one disturbed; on
the way, that the checkpoint in place can always be read and that no more than one interval was lost.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

import miepo.training.checkpoint_io
from miepo.rollout import TransformersEngine
from tests.helpers.fit import MEASURES
from tests.helpers.interruption import kept, logged, same
from tests.helpers.tiny import Letters, save_tiny_model

INTERVAL = 3  # optimiser steps between two checkpoints
MOMENTS = (
    "rollout",
    "scoring",
    "backward",
    "update",
    "evaluation",
    "checkpoint half written",
    "checkpoint not renamed",
)
PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food"]


class _Countdown:
    """Kills this process at the n-th time that a moment comes."""

    def __init__(self) -> None:
        self.moment, _, count = os.environ.get("KILL_AT", "").partition(":")
        self.left = int(count or 0)

    def reached(self, moment: str) -> bool:
        self.left -= moment == self.moment
        return moment == self.moment and self.left == 0


countdown = _Countdown()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Engine(TransformersEngine):
    def sample(self, *args: Any) -> Any:
        made = super().sample(*args)
        if countdown.reached("rollout"):
            die()
        return made


class Scorer(Letters):
    def score(self, prompts: Any, responses: Any) -> list[float]:
        if countdown.reached("scoring"):
            die()
        return super().score(prompts, responses)


class Killer(Callback):
    """Knows the moments, and writes down how many steps are done."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        save = torch.save

        def half(content: Any, file: Any) -> None:
            if countdown.reached("checkpoint half written"):
                save(content, file)
                file.truncate(file.tell() // 2)
                file.flush()
                die()
            save(content, file)

        def unnamed(number: int) -> None:
            if countdown.reached("checkpoint not renamed"):
                die()

        miepo.training.checkpoint_io.torch.save = half  # type: ignore[attr-defined]
        miepo.training.checkpoint_io.os.fsync = unnamed  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        (Path(trainer.default_root_dir) / "steps").write_text(str(trainer.global_step))

    def on_after_backward(self, *_: Any) -> None:
        if countdown.reached("backward"):
            die()

    def on_train_batch_end(self, *_: Any) -> None:
        if countdown.reached("update"):
            die()

    def on_validation_batch_end(self, *_: Any) -> None:
        if countdown.reached("evaluation"):
            die()


def configuration(model: Path, root: Path, seed: int) -> Path:
    values = {
        "seed_everything": seed,
        "trainer": {
            "accelerator": "cpu", "max_epochs": 4, "num_sanity_val_steps": -1, "log_every_n_steps": 1,
            "val_check_interval": 4, "gradient_clip_val": 1.0, "enable_progress_bar": False,
            "default_root_dir": str(root),
            "logger": [
                {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(root), "name": "r"}}
            ],
            "callbacks": [
                {"class_path": "tools.kill_runs.Killer"}, *({"class_path": f"miepo.callbacks.{n}"} for n in MEASURES)
            ],
        },
        "objectives": [
            {"class_path": "tools.kill_runs.Scorer", "init_args": {"letter": "e"}},
            {"class_path": "miepo.objectives.Brevity"},
        ],
        "model": {
            "policy": {
                "class_path": "miepo.policy.Policy",
                "init_args": {
                    "base": str(model), "dtype": "float32", "lora_rank": 2, "lora_dropout": 0.2,
                    "conditioning": [{"class_path": "miepo.policy.GatedConditioning"}],
                },
            },
            "learning_rate": 0.01,
        },
        "data": {
            "prompts": PROMPTS * 4, "validation_prompts": ["the rain", "a garden"], "batch_size": 2,
            "max_new_tokens": 5, "normalise_on": 4, "grid": 3, "engine": {"class_path": "tools.kill_runs.Engine"},
        },
        "checkpoint": {"every_n_steps": INTERVAL},
    }  # fmt: skip
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(file: Path, moment: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "miepo", "fit", "--config", str(file), "--ckpt_path", "last"]
    with (file.parent / "log").open("a") as log:
        return subprocess.Popen(command, env=os.environ | {"KILL_AT": moment}, stdout=log, stderr=log)


def check(root: Path) -> str | None:
    """Return what is wrong with what a killed process left."""
    steps, found = root / "steps", list(root.glob("r/*/checkpoints/last.ckpt"))
    done = int(steps.read_text() or 0) if steps.exists() else 0
    if len(found) > 1:
        return f"{len(found)} runs instead of one"
    saved = torch.load(found[0], weights_only=True)["global_step"] if found else 0
    if done - saved > INTERVAL:
        return f"{done} steps were done, the checkpoint is of {saved}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.kill_runs", description=__doc__)
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--kills_per_run", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng, kills, wrong = random.Random(options.seed), dict.fromkeys(("a random time", *MOMENTS), 0), []
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model")
        runs = 0
        while sum(kills.values()) < options.kills:
            roots = [Path(folder) / f"{runs}{name}" for name in ("whole", "killed")]
            for root in roots:
                root.mkdir()
            whole, killed = (configuration(model, root, options.seed + runs) for root in roots)
            began = time.monotonic()
            if start(whole).wait():
                raise SystemExit((roots[0] / "log").read_text()[-2000:])
            took, done = time.monotonic() - began, 0
            while done < options.kills_per_run and sum(kills.values()) < options.kills:
                moment = rng.choice(("a random time", *MOMENTS))
                process = start(killed, "" if moment == "a random time" else f"{moment}:{rng.randint(1, 5)}")
                try:
                    status = process.wait(rng.uniform(0.2, 1.0) * took if moment == "a random time" else 120)
                except subprocess.TimeoutExpired:
                    process.kill()
                    status = process.wait()
                if status == 0:
                    break  # it was faster
                if status != -signal.SIGKILL:
                    raise SystemExit((roots[1] / "log").read_text()[-2000:])
                kills[moment], done = kills[moment] + 1, done + 1
                if problem := check(roots[1]):
                    wrong.append(f"run {runs}, {moment}: {problem}")
            if start(killed).wait():
                raise SystemExit((roots[1] / "log").read_text()[-2000:])
            # a process that is killed before its first checkpoint leaves a folder without one
            a, b = (next(root.glob("r/*/checkpoints/last.ckpt")).parents[1] for root in roots)
            if logged(a) != logged(b):
                wrong.append(f"run {runs}: other figures were logged")
            if not same(kept(a), kept(b)):
                wrong.append(f"run {runs}: another state at the end")
            runs += 1
            print(f"run {runs}: killed {done} times", flush=True)
        size = next((roots[1]).glob("r/*/checkpoints/last.ckpt")).stat().st_size
    print(f"{sum(kills.values())} kills in {runs} runs: " + ", ".join(f"{n} at {k}" for k, n in kills.items() if n))
    print("Every run ended as the undisturbed one, bit for bit." if not wrong else "\n".join(wrong))
    print(f"A checkpoint of the tiny model: {size / 1e3:.0f} kB")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
