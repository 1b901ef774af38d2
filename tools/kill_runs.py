"""Runs that are killed again and again end as runs that were not: ``python -m tools.kill_runs [--launcher ray]``.

A tiny model is trained by the real command in processes that get SIGKILL: at random times, and at moments that random
times seldom hit, from within. Each is started again with ``--ckpt_path last``. At the end the adapter, the optimiser,
the normalisations and every logged figure but times are compared, bit for bit, with a run that no one disturbed; on
the way, that the checkpoint in place can always be read and that no more than one interval was lost.

With ``--launcher ray`` a run has two workers, of which one is killed; Ray starts them again. It is compared with one of
two processes under torchrun. Ray may not know yet of a checkpoint that was just reported: up to two intervals are lost.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

import miepo.training.checkpoint_io
from miepo.callbacks import RunCheckpoint
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
RAYS_MOMENTS = ("checkpoint not reported", "checkpoint just reported")
RANDOM = "a random time"
PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food"]


class _Countdown:
    """Kills this process at the n-th time that a moment comes, or n seconds after training began.

    Which moment, how often and on which process is told by KILL_AT; or, of processes that are started again by others,
    by the line of the file KILL_PLAN whose turn it is: as many are over as deaths were noted beside it.
    """

    def __init__(self) -> None:
        told = os.environ.get("KILL_AT", "")
        self.plan = Path(os.environ["KILL_PLAN"]) if "KILL_PLAN" in os.environ else None
        if self.plan is not None:
            lines, over = self.plan.read_text().splitlines(), deaths(self.plan.parent)
            told = lines[over] if over < len(lines) else ""
        self.moment, _, rest = told.partition(":")
        count, _, self.rank = rest.partition(":")
        self.left = float(count or 0)

    @property
    def here(self) -> bool:
        return not self.rank or self.rank == os.environ.get("RANK")

    def reached(self, moment: str) -> bool:
        self.left -= moment == self.moment
        return moment == self.moment and self.left == 0 and self.here


def note(root: Path, what: str, step: int) -> None:
    with (root / "events").open("a") as file:
        file.write(f"{what} {step}\n")


def events(root: Path) -> list[tuple[str, int]]:
    """Return what was noted, of the deaths and of the steps from which training began, in its order."""
    file = root / "events"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def deaths(root: Path) -> int:
    return sum(what == "dies" for what, _ in events(root))


def lost(root: Path) -> list[int]:
    """Return how many steps were done again after each death in training."""
    costs, done = [], 0
    for what, step in events(root):
        if what == "begins" and done:
            costs.append(done - step)
        done = max(done, step) if what == "dies" else 0
    return costs


countdown = _Countdown()


def die() -> None:
    if countdown.plan is not None:
        root = countdown.plan.parent
        steps = root / "steps"
        note(root, "dies", int(steps.read_text() or 0) if steps.exists() else 0)
    os.kill(os.getpid(), signal.SIGKILL)


class Engine(TransformersEngine):
    def draw(self, *args: Any) -> Any:
        made = super().draw(*args)
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

        def half(content: Any, file: Any, **kwargs: Any) -> None:
            if kwargs:  # what processes tell each other
                return save(content, file, **kwargs)
            if countdown.reached("checkpoint half written"):
                save(content, file)
                file.truncate(file.tell() // 2)
                file.flush()
                die()
            return save(content, file)

        def unnamed(number: int) -> None:
            if countdown.reached("checkpoint not renamed"):
                die()

        if countdown.moment == RANDOM and countdown.here:
            threading.Timer(countdown.left, die).start()
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint) and callback.after_save is not None:
                callback.after_save = reporting(callback.after_save)
        miepo.training.checkpoint_io.torch.save = half  # type: ignore[attr-defined]
        miepo.training.checkpoint_io.os.fsync = unnamed  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            note(Path(trainer.default_root_dir), "begins", trainer.global_step)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
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


def reporting(report: Any) -> Any:
    def with_moments(*args: Any) -> None:
        if countdown.reached("checkpoint not reported"):
            die()
        report(*args)
        if countdown.reached("checkpoint just reported"):
            die()

    return with_moments


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


def run_on_ray(file: Path, rng: random.Random, turns: list[str]) -> int:
    """Run with two workers, of which one is killed at each of these moments in turn; return how many it came to."""
    plan = file.with_name("plan")
    counts = (rng.uniform(0.2, 4) if moment == RANDOM else rng.randint(1, 2) for moment in turns)
    # the first process writes checkpoints
    ranks = (0 if "written" in moment or "renamed" in moment else rng.randint(0, 1) for moment in turns)
    plan.write_text("\n".join(f"{m}:{c}:{r}" for m, c, r in zip(turns, counts, ranks, strict=True)))
    command = [sys.executable, "-m", "miepo", "fit", "--config", str(file), "--launcher", "ray"]
    command += ["--ray.num_workers", "2", "--ray.max_failures", "-1", "--ray.address", "local"]
    environment = os.environ | {"KILL_PLAN": str(plan), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    with (file.parent / "log").open("a") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode:
            raise SystemExit((file.parent / "log").read_text()[-5000:])
    return deaths(file.parent)


def run_by_two(file: Path) -> None:
    """Run under torchrun, undisturbed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "miepo"]
    command += ["fit", "--config", str(file), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with (file.parent / "log").open("a") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise SystemExit((file.parent / "log").read_text()[-5000:])


def kill_on_ray(options: Any) -> int:
    """Kill workers of Ray, and return the exit status."""
    rng, kills, wrong, costs = random.Random(options.seed), dict.fromkeys((RANDOM, *MOMENTS, *RAYS_MOMENTS), 0), [], []
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model")
        runs, turns = 0, []
        while (left := options.kills - sum(kills.values())) > 0:
            roots = [Path(folder) / f"{runs}{name}" for name in ("whole", "killed")]
            for root in roots:
                root.mkdir()
            whole, killed = (configuration(model, root, options.seed + runs) for root in roots)
            run_by_two(whole)
            while len(turns) < min(left, options.kills_per_run):
                turns += rng.sample([*kills], k=len(kills))
            died = run_on_ray(killed, rng, turns[: min(left, options.kills_per_run)])
            for moment in turns[:died]:
                kills[moment] += 1
            turns = turns[died:]
            costs += lost(roots[1])
            if len(found := list(roots[1].glob("r/*"))) != 1:
                wrong.append(f"run {runs}: {len(found)} folders instead of one")
            a, b = (next(root.glob("r/*/checkpoints/last.ckpt")).parents[1] for root in roots)
            if logged(a) != logged(b):
                wrong.append(f"run {runs}: other figures were logged")
            if not same(kept(a), kept(b)):
                wrong.append(f"run {runs}: another state at the end")
            runs += 1
            print(f"run {runs}: a worker killed {died} times", flush=True)
    print(f"{sum(kills.values())} kills in {runs} runs: " + ", ".join(f"{n} at {k}" for k, n in kills.items() if n))
    print("Every run ended as two processes under torchrun, bit for bit." if not wrong else "\n".join(wrong))
    print(f"Steps that a kill cost: at most {max(costs, default=0)}, with a checkpoint every {INTERVAL}")
    return 1 if wrong or max(costs, default=0) > 2 * INTERVAL else 0


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.kill_runs", description=__doc__)
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--kills_per_run", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=["ray"])
    options = parser.parse_args(arguments)
    if options.launcher == "ray":
        return kill_on_ray(options)
    rng, kills, wrong = random.Random(options.seed), dict.fromkeys((RANDOM, *MOMENTS), 0), []
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
                moment = rng.choice((RANDOM, *MOMENTS))
                process = start(killed, "" if moment == RANDOM else f"{moment}:{rng.randint(1, 5)}")
                try:
                    status = process.wait(rng.uniform(0.2, 1.0) * took if moment == RANDOM else 120)
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
