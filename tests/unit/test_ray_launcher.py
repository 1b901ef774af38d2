"""What ``--launcher ray`` refuses before Ray is asked, and the names of Ray that are not public."""

from __future__ import annotations

import ast
import importlib.util
import logging
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from miepo.cli.command import main
from miepo.cli.resume import continue_logs
from miepo.errors import UserError
from miepo.rollout import ServerEngine, TransformersEngine
from miepo.training import ray_launcher
from miepo.training.loggers import WandbLogger
from miepo.training.ray_failures import died, ending_mistakes
from miepo.training.ray_launcher import (
    RayLauncher,
    check_address,
    check_room,
    of_the_controller,
    pinned_versions,
    storage_place,
)
from miepo.training.ray_servers import PORT, ServerProcess
from tests.integration.test_cli import config

STRATEGIES = "lightning.pytorch.strategies"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Ray be there for what only asks whether it is."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "another launcher": (["--launcher", "slurm"], "launcher: expected 'ray' or null, got 'slurm'"),
    "no worker": (["--ray.num_workers", "0"], "ray.num_workers must be at least 1, got 0"),
    "a part of a worker": (["--ray.num_workers", "1.5"], "ray.num_workers: expected int, got 1.5"),
    "two GPUs for a worker": (
        ["--ray.gpus_per_worker", "2"],
        "ray.gpus_per_worker must be 0 or 1, since a worker has one device, got 2",
    ),
    "no CPU": (["--ray.cpus_per_worker", "0"], "ray.cpus_per_worker must be a number above 0, got 0"),
    "GPUs by another name": (
        ["--ray.resources_per_worker", '{"GPU": 1}'],
        "ray.resources_per_worker: expected ray.gpus_per_worker for GPU",
    ),
    "failures below none": (
        ["--ray.max_failures", "-2"],
        "ray.max_failures must be at least 0, or -1 for any number of times, got -2",
    ),
    "a strategy that is not Ray's": (
        ["--trainer.strategy", "fsdp"],
        "--launcher ray runs trainer.strategy auto, ddp or sharded, got fsdp",
    ),
    "a strategy by its class": (
        ["--trainer.strategy", f"{{class_path: {STRATEGIES}.SingleDeviceStrategy}}"],
        f"--launcher ray runs trainer.strategy auto, ddp or sharded, got {STRATEGIES}.SingleDeviceStrategy",
    ),
    "devices beside workers": (
        ["--trainer.devices", "2", "--ray.num_workers", "2"],
        "with --launcher ray ray.num_workers counts the processes, on whichever machines they are: "
        "expected trainer.devices auto, got 2",
    ),
    "machines beside workers": (["--trainer.num_nodes", "2"], "expected trainer.num_nodes 1, got 2"),
    "a GPU for a CPU": (
        ["--ray.gpus_per_worker", "1"],
        "expected ray.gpus_per_worker 0 with trainer.accelerator cpu, got 1",
    ),
    "another device": (["--trainer.accelerator", "tpu"], "expected trainer.accelerator auto, got tpu"),
    "no place for logs": (["--trainer.logger", "true"], "expected trainer.logger, got none"),
    "no port": (
        ["--ray.address", "head"],
        "expected the address of a Ray cluster, HOST:PORT, auto or local, got 'head'",
    ),
    "a client's address": (["--ray.address", "ray://head:10001"], "HOST:PORT, auto or local, got 'ray://head:10001'"),
    "a port that is none": (["--ray.address", "head:66666"], "HOST:PORT, auto or local, got 'head:66666'"),
}


def refused(words: list[str], values: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as end:
        main([words[0], "--config", str(root / "run.yaml"), *words[1:]])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("miepo: error: ")]
    assert not (root / "run").exists()
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    installed: None, mistake: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[mistake]
    line = refused(["fit", "--launcher", "ray", *words], config(tiny_model, tmp_path), tmp_path, capsys)
    assert line.endswith(message)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_are_not_launched(
    installed: None, command: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([command, "--launcher", "ray"], config(tiny_model, tmp_path), tmp_path, capsys)
    assert line == f"miepo: error: --launcher ray is for fit alone, got {command}: run it without --launcher"


def test_without_ray(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(["fit", "--launcher", "ray"], config(tiny_model, tmp_path), tmp_path, capsys)
    assert line.endswith("--launcher ray needs the package 'ray', which is not installed: pip install \"miepo[ray]\"")


def test_no_one_at_the_address(
    installed: None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named by the environment; Ray itself would try for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = refused(["fit", "--launcher", "ray"], config(tiny_model, tmp_path), tmp_path, capsys)
    assert line.endswith(f"expected a Ray cluster at '{address}', got no answer: Connection refused")


def test_someone_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
    check_address("auto")


# -- room and storage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "needs", "room"),
    [
        (3, {"CPU": 1, "GPU": 0}, 9),
        (10, {"CPU": 1, "GPU": 0}, 9),
        (4, {"CPU": 2, "GPU": 1}, 3),  # 2 of the first machine by its GPUs, 1 of the second by its CPUs
        (1, {"CPU": 16}, 0),
        (2, {"CPU": 0.5, "big": 1}, 1),
    ],
)
def test_room_is_counted_by_machine(workers: int, needs: dict[str, float], room: int) -> None:
    nodes = [{"CPU": 6.0, "GPU": 2.0, "memory": 1e9}, {"CPU": 3.0, "GPU": 8.0, "big": 1.0}]
    if workers <= room:
        check_room(workers, needs, nodes)
        return
    with pytest.raises(UserError, match=f"^expected ray.num_workers of at most {room}, got {workers}: each needs "):
        check_room(workers, needs, nodes)


def test_storage_is_shared_by_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_place(None, "runs", 1) == str(tmp_path / "runs/ray_checkpoints")
    assert storage_place("kept", "runs", 1) == str(tmp_path / "kept")
    for shared in ("/shared/runs", "s3://bucket/runs"):
        assert storage_place(shared, "runs", 2) == shared
    for storage, got in (("kept", "'kept'"), (None, "none")):
        with pytest.raises(UserError, match=f"^the cluster has 2 machines: expected ray.storage .*, got {got}$"):
            storage_place(storage, "runs", 2)


@pytest.mark.parametrize(
    ("given", "accelerator", "there", "used"),
    [(None, "auto", 8, 1), (None, "auto", 0, 0), (None, "cpu", 8, 0), (None, "gpu", 0, 1), (0, "auto", 8, 0), (1, "auto", 0, 1)],
)  # fmt: skip
def test_gpus(given: int | None, accelerator: str, there: int, used: int) -> None:
    assert RayLauncher(gpus_per_worker=given)._gpus(accelerator, [{"CPU": 4.0, "GPU": float(there)}]) == used


# -- the logs of workers that are started again ------------------------------------------------------------------------


def test_logs_stay_where_they_began(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="run"), WandbLogger(project="p", save_dir=str(tmp_path), offline=True)]
    trainer = Trainer(accelerator="cpu", logger=loggers, enable_checkpointing=False)
    csv, wandb = pinned_versions(trainer)
    assert csv == {"class": "CSVLogger", "version": 0}
    assert len(wandb["version"]) == 8
    entries = [
        Namespace(class_path=f"miepo.training.loggers.{kind}", init_args=Namespace()) for kind in ("CSVLogger", "WandbLogger")
    ]  # fmt: skip
    continue_logs(entries, [csv, wandb], resume=False)
    assert entries[0].init_args == Namespace(version=0, resume=False)
    assert entries[1].init_args == Namespace(id=wandb["version"], resume="allow")
    assert list(tmp_path.iterdir()) == []


# -- Ray's own names ---------------------------------------------------------------------------------------------------


def test_the_launcher_imports_ray_where_it_is_needed() -> None:
    """And so does every ``miepo fit``, its help, too."""
    tree = ast.parse(Path(ray_launcher.__file__).read_text())
    modules = [name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names]
    modules += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert modules
    assert not [name for name in modules if name.split(".")[0] == "ray"]


def test_rays_errors_have_the_names_that_are_looked_for() -> None:
    internal = pytest.importorskip("ray.train.v2._internal.exceptions")
    assert died(internal.WorkerHealthCheckFailedError("gone", failure=OSError()))
    assert died(internal.WorkerHealthCheckTimeoutError("silent"))
    assert not died(RuntimeError("connection closed by peer"))
    for error in (internal.WorkerGroupStartupTimeoutError(2), internal.WorkerGroupStartupFailedError("at once")):
        assert of_the_controller(error, 2).startswith("expected room for 2 workers on the cluster, got none in 10 ")


def test_rays_reports_are_not_printed() -> None:
    context = pytest.importorskip("ray.train.v2._internal.execution.context")
    context.logger.setLevel(logging.NOTSET)
    ray_launcher._quiet()
    assert context.logger.level == logging.WARNING


def test_a_mistake_ends_a_run_and_a_death_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    internal = pytest.importorskip("ray.train.v2._internal.exceptions")
    failures = ending_mistakes(1)
    dead = {0: RuntimeError("closed by peer"), 1: internal.WorkerHealthCheckFailedError("gone", failure=OSError())}
    for _ in range(2):  # the second is one too many, and says nothing of another start
        failures.after_exception(None, dead)
    assert (
        capsys.readouterr().out == "Worker 1 died: all of them start again, from the last checkpoint that Ray knows\n"
    )
    mistake = {0: UserError("another process ended: no server"), 1: RuntimeError("closed by peer")}
    with pytest.raises(UserError, match=r"^no server$"):
        failures.after_exception(None, mistake)
    with pytest.raises(UserError, match=r"^objective x: no server$"):
        failures.after_exception(None, mistake | {1: UserError("objective x: no server")})


# -- rollout servers ---------------------------------------------------------------------------------------------------

HEALTHY = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_that_is_killed_is_started_again_at_its_address() -> None:
    server = ServerProcess([sys.executable, "-c", HEALTHY, PORT], {})
    url = server.start("127.0.0.1", 30)
    assert server.process is not None
    first = server.process.pid
    server.process.kill()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200 and server.process.pid != first:
                break
        except httpx.HTTPError:
            time.sleep(0.05)
    assert server.process.pid != first
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([sys.executable, "-c", "raise SystemExit(1)"], "got none: it ends at once"),
        (["/no/such/program"], "got none: it ends at once"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "got none: none answers within 0.6 s"),
    ],
)
def test_a_server_that_does_not_start_is_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServerProcess(words, {}).start("127.0.0.1", 0.6 if "sleep" in words[-1] else 30)


def test_servers_need_an_engine_that_asks_them() -> None:
    launcher = RayLauncher(rollout_servers=2)
    for engine, got in ((TransformersEngine(), "TransformersEngine"), (ServerEngine(["http://a:1"]), "with urls")):
        with pytest.raises(UserError, match=f"needs data.engine ServerEngine without urls, got .*{got}"):
            launcher._check_engine(SimpleNamespace(engine=engine))
    launcher._check_engine(SimpleNamespace(engine=ServerEngine()))
    with pytest.raises(UserError, match=r"ray.rollout_servers must not be negative, got -1"):
        RayLauncher(rollout_servers=-1)
