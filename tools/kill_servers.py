"""A run whose rollout servers and whose own process are killed ends as one that no one disturbed.

``python -m tools.kill_servers`` trains a tiny model on two small servers that speak vLLM's routes; with ``--python`` of
an environment with vLLM, SmolLM2 on two vLLM servers. SIGKILL comes to a server or to the run itself at every phase of
a step. A server is started again, and so is the run, with ``--ckpt_path last``. At the end adapter, optimiser and
every logged figure but times are compared, bit for bit, with an undisturbed run, and so are the prompts of every step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from miepo.cli.rollout_server import MODULE
from miepo.rollout import ServerEngine
from miepo.types import Responses
from tests.helpers.interruption import kept, logged, same
from tests.helpers.tiny import save_tiny_model
from tools import kill_runs
from tools.benchmark import BASE

SERVERS = 2
OWN = ("adapter written", "requests sent")  # moments beside those of kill_runs
MOMENTS = (*OWN, *kill_runs.MOMENTS)
HALF = "checkpoint half written"  # where the run itself has to end
RUN = "run"  # a victim; the others are servers, by number
DIFFERING = ("count/asked_again",)


class Turns:
    """Kills at one moment after the other, as the file KILL_TURNS says: a moment, how often it comes first, a victim.

    Which turn it is stands in a file beside it, since the run itself may be the victim.
    """

    plan = None
    moment = ""
    here = True

    def __init__(self) -> None:
        self.place = Path(os.environ.get("KILL_TURNS", "/nonexistent"))
        self.turns = json.loads(self.place.read_text()) if self.place.exists() else []
        self.over = self.place.with_name("over")
        self.seen = 0

    def reached(self, moment: str) -> bool:
        turn = int(self.over.read_text()) if self.over.exists() else 0
        if turn >= len(self.turns) or self.turns[turn][0] != moment:
            return False
        self.seen += 1
        return self.seen >= self.turns[turn][1]

    def kill(self) -> None:
        turn = int(self.over.read_text()) if self.over.exists() else 0
        victim, self.seen = self.turns[turn][2], 0
        self.over.write_text(str(turn + 1))
        if victim == RUN:
            os.kill(os.getpid(), signal.SIGKILL)
        file = self.place.with_name(f"server{victim}")
        end = time.monotonic() + 300
        while not file.exists() and time.monotonic() < end:  # it is not up after its last death
            time.sleep(0.05)
        process = int(file.read_text())
        file.unlink()
        os.kill(process, signal.SIGKILL)


turns = Turns()
kill_runs.countdown, kill_runs.die = turns, turns.kill  # type: ignore[assignment]


class Engine(ServerEngine):
    def _published(self, policy: Any) -> Any:
        former, found = self._raw, super()._published(policy)
        if found is not former and turns.reached("adapter written"):
            turns.kill()
        return found

    def begin(self, policy: Any, *args: Any) -> Callable[[], Responses]:
        wait = super().begin(policy, *args)
        if turns.reached("requests sent"):
            turns.kill()

        def waited() -> Responses:
            found = wait()
            if turns.reached("rollout"):
                turns.kill()
            return found

        return waited


class Killer(kill_runs.Killer):
    """Writes down the prompts of every step, too."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        with (Path(trainer.default_root_dir) / "prompts").open("a") as file:
            file.write(json.dumps([trainer.global_step, list(batch.prompts), batch.preference.tolist()]) + "\n")
        super().on_train_batch_end()


def configuration(model: str, root: Path, urls: list[str], options: Any) -> Path:
    file = kill_runs.configuration(Path(model), root, options.seed)
    values = yaml.safe_load(file.read_text())
    values["trainer"]["callbacks"][0]["class_path"] = "tools.kill_servers.Killer"
    engine = {"urls": urls, "timeout": 120, "patience": 300, "folder": str(root / "adapters")}
    values["data"] |= {"engine": {"class_path": "tools.kill_servers.Engine", "init_args": engine}}
    values["data"] |= {"staleness": options.staleness}
    values["model"]["policy"]["init_args"] |= {"base": model}
    values["trainer"] |= {"max_steps": options.steps}
    if options.steps > 0:
        values["trainer"] |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    if options.python:
        values["data"] |= {"max_new_tokens": 8, "validation_prompts": ["Tell me about rain."]}
        values["model"] |= {"learning_rate": 0.0001}
        values["model"]["policy"]["init_args"] |= {"lora_rank": 4}
    file.write_text(yaml.safe_dump(values))
    return file


@contextmanager
def servers(model: str, root: Path, ports: list[int], options: Any) -> Iterator[None]:
    """Keep servers running, whatever kills them; the file ``serverN`` has the process of one that is up."""
    commands = []
    for port in ports:
        if options.python:
            line = [options.python, "-m", MODULE, "--model", model, "--dtype", "float32", "--enable-lora", "--port"]
            line += [str(port), "--host", "127.0.0.1", "--max-lora-rank", "16", "--max-loras", "3", "--enforce-eager"]
            line += [
                "--no-enable-chunked-prefill",
                "--max-model-len",
                "256",
                "--generation-config",
                "vllm",
                "--logprobs-mode",
                "processed_logprobs",
            ]
        else:
            line = [sys.executable, "-m", "tests.helpers.vllm_server", model, "--port", str(port), "--gates"]
        commands.append(line)
    environment = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_PLUGINS": "miepo", "VLLM_USE_V2_MODEL_RUNNER": "0",
    }  # fmt: skip
    ended = threading.Event()

    def keep(number: int) -> None:
        file = root / f"server{number}"
        while not ended.is_set():
            with (root / f"server{number}.log").open("a") as log:
                process = subprocess.Popen(
                    commands[number], env=environment, stdout=log, stderr=log, start_new_session=True
                )
            while process.poll() is None and not ended.is_set():
                try:
                    if not file.exists():
                        httpx.get(f"http://127.0.0.1:{ports[number]}/health", timeout=2).raise_for_status()
                        if process.poll() is None:
                            file.write_text(str(process.pid))
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            file.unlink(missing_ok=True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(len(commands))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def fit(file: Path) -> int:
    """Run to the end, starting again where the run was killed; return how often it was."""
    environment = os.environ | {"KILL_TURNS": str(file.with_name("turns"))}
    command = [sys.executable, "-m", "miepo", "fit", "--config", str(file), "--ckpt_path", "last"]
    for died in range(1000):
        with (file.parent / "log").open("a") as log:
            status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if status == 0:
            return died
        if status != -signal.SIGKILL:
            raise SystemExit((file.parent / "log").read_text()[-3000:])
    raise SystemExit("the run does not end")


def prompts_of(root: Path) -> dict[int, Any]:
    """Return prompts and preferences of each step; what a killed run did again counts once, and must be alike."""
    found: dict[int, Any] = {}
    for line in (root / "prompts").read_text().splitlines():
        step, *content = json.loads(line)
        if found.setdefault(step, content) != content:
            raise SystemExit(f"step {step} was repeated with other prompts")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.kill_servers", description=__doc__)
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=-1, help="optimiser steps; by default four epochs")
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--python", help="of an environment with vLLM and miepo, in place of small servers")
    parser.add_argument("--port", type=int, default=8300)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    plan: list[tuple[str, int, Any]] = []
    victims = [RUN, *range(SERVERS)]
    while len(plan) < options.kills:  # every moment with every kind of victim before any again
        moments = [(moment, victim) for moment in MOMENTS for victim in (RUN, rng.choice(victims[1:]))]
        moments = [(moment, victim) for moment, victim in moments if victim == RUN or moment != HALF]
        plan += [(moment, rng.randint(1, 2), victim) for moment, victim in rng.sample(moments, len(moments))]
    plan = plan[: options.kills] if options.steps < 0 else [t for t in plan if t[0] != "evaluation"][: options.kills]
    ports = [options.port + number for number in range(SERVERS)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        model = BASE if options.python else str(save_tiny_model(Path(folder) / "model"))
        if options.python:
            from miepo.policy.base_model import base_folder

            model = base_folder(BASE)
        states = []
        for name, its in (("whole", []), ("killed", plan)):
            root = Path(folder) / name
            root.mkdir()
            (root / "turns").write_text(json.dumps(its))
            file = configuration(model, root, urls, options)
            began = time.monotonic()
            with servers(model, root, ports, options):
                died = fit(file)
            over = int((root / "over").read_text()) if (root / "over").exists() else 0
            print(f"{name}: {time.monotonic() - began:.0f} s, {over} kills, {died} of them of the run", flush=True)
            run = next(root.glob("r/*/checkpoints/last.ckpt")).parents[1]
            rows = [{k: v for k, v in row.items() if k not in DIFFERING} for row in logged(run)]
            states.append((kept(run), rows, prompts_of(root), over))
            left = [path.name for path in (root / "adapters").iterdir()]
            print(f"  adapters left on disk: {len(left)}")
        (a, rows_a, prompts_a, _), (b, rows_b, prompts_b, over) = states
        if prompts_a != prompts_b:
            wrong.append("other prompts, or prompts lost or doubled")
        if rows_a != rows_b:
            wrong.append("other figures were logged")
        if not same(a, b):
            wrong.append("another state at the end")
    by = ", ".join(f"{moment} ({victim if victim == RUN else 'server'})" for moment, _, victim in plan[:over])
    print(f"{over} kills in a run of {len(prompts_a)} steps: {by}")
    print("It ended as the undisturbed one, bit for bit." if not wrong else "; ".join(wrong))
    return 1 if wrong or over < options.kills else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
