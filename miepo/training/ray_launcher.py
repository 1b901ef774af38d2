"""Ray as the launcher of a run: ``miepo fit --launcher ray``.

The command itself builds the configuration, so that a mistake ends it at once, and hands its own words to the workers
that Ray Train places. Each worker runs the same command in its own process (:class:`RayWorker`), with the trainer's
strategy, devices and environment replaced by Ray's. Whenever the run's checkpoint is written, Ray Train is told of it,
and starts the workers again from the last one that it knows when one of them dies.

Ray is imported by what needs it, and takes a second: this module is imported by every ``miepo fit``.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from miepo.errors import UserError, first_line
from miepo.training.ray_failures import died, ending_mistakes
from miepo.training.ray_servers import PORT, start_servers, stop_servers
from miepo.training.reporting import log_versions
from miepo.training.run_checkpoint import Interrupted, RunCheckpoint
from miepo.training.sharded_strategy import ShardedStrategy

# what the trainer's strategy may be: how it is written, and the part of Ray's that it becomes
DDP, SHARDED = "ddp", "sharded"
STRATEGIES = {
    "auto": DDP,
    "ddp": DDP,
    "lightning.pytorch.strategies.DDPStrategy": DDP,
    "lightning.pytorch.strategies.ddp.DDPStrategy": DDP,
    "sharded": SHARDED,
    "miepo.training.sharded_strategy.ShardedStrategy": SHARDED,
}
GPU = ("gpu", "cuda")
# of the command's environment, what the workers have to have alike; accounts and tokens are not handed on, since Ray
# shows the environment of a worker to whoever sees its cluster
HANDED_ON = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE", "MPLBACKEND", "MIEPO_CACHE", "MIEPO_TRACEBACK")
SERVER_PATIENCE = 1800.0  # seconds for rollout servers, which load the base
STARTS = 10  # each waits a minute for room that other work takes
# the trainer of the command itself, which trains nothing and may be on a machine without the workers' devices
UNUSED_DEVICES = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "plugins": None}


class RayLauncher:
    """Runs a command on the workers of a Ray cluster, and goes on from the last checkpoint when one of them dies.

    Args:
        num_workers: Processes of the run, each with one device. Several do what one does with a batch as large as all
            of theirs.
        gpus_per_worker: 1, or 0 to train on CPUs. By default 1 where the cluster has GPUs and trainer.accelerator is
            not cpu.
        cpus_per_worker: CPUs that Ray sets aside for each worker.
        resources_per_worker: Resources of your cluster's own that each worker needs, by name, {"big_node": 1} say.
        max_failures: How often the workers are started again after one has died; -1 for any number of times.
        storage: Folder or URI where Ray keeps the last checkpoint that it was told of. Several machines must share
            it. By default ray_checkpoints in trainer.default_root_dir.
        rollout_servers: vLLM servers that are started as actors on the cluster, for data.engine ServerEngine without
            urls.
        rollout_gpus: GPUs of each; by default as many as a worker has.
        rollout_cpus: CPUs that Ray sets aside for each.
        rollout_python: Interpreter of an environment with vLLM and miepo, on the machines of the servers.
        rollout_command: Words that start a server, of which {port} becomes its port; by default the line of miepo
            rollout-server for this configuration.
        address: HOST:PORT of a cluster that this machine is part of, auto for the one that runs here, or local for a
            new one of this machine alone. By default RAY_ADDRESS, then auto, then local.
    """

    def __init__(
        self,
        num_workers: int = 1,
        gpus_per_worker: int | None = None,
        cpus_per_worker: float = 1,
        resources_per_worker: dict[str, float] | None = None,
        max_failures: int = 3,
        storage: str | None = None,
        rollout_servers: int = 0,
        rollout_gpus: int | None = None,
        rollout_cpus: float = 1,
        rollout_python: str = "python",
        rollout_command: list[str] | None = None,
        address: str | None = None,
    ) -> None:
        if num_workers < 1:
            raise UserError(f"ray.num_workers must be at least 1, got {num_workers}")
        if gpus_per_worker not in (None, 0, 1):
            raise UserError(f"ray.gpus_per_worker must be 0 or 1, since a worker has one device, got {gpus_per_worker}")
        if not 0 < cpus_per_worker < math.inf:
            raise UserError(f"ray.cpus_per_worker must be a number above 0, got {cpus_per_worker:g}")
        for name, amount in (resources_per_worker or {}).items():
            if name in ("CPU", "GPU"):
                raise UserError(f"ray.resources_per_worker: expected ray.{name.lower()}s_per_worker for {name}")
            if not 0 < amount < math.inf:
                raise UserError(f"ray.resources_per_worker must be numbers above 0, got {amount:g} of {name}")
        if max_failures < -1:
            raise UserError(f"ray.max_failures must be at least 0, or -1 for any number of times, got {max_failures}")
        self.num_workers, self.gpus_per_worker, self.cpus_per_worker = num_workers, gpus_per_worker, cpus_per_worker
        self.resources_per_worker, self.max_failures = resources_per_worker or {}, max_failures
        self.storage, self.address = storage, address
        if rollout_servers < 0:
            raise UserError(f"ray.rollout_servers must not be negative, got {rollout_servers}")
        self.rollout_servers, self.rollout_gpus, self.rollout_cpus = rollout_servers, rollout_gpus, rollout_cpus
        self.rollout_python, self.rollout_command = rollout_python, rollout_command

    def check(self, command: str, trainer: Any) -> None:
        """Refuse what no cluster could run, before anything is built.

        Args:
            command: ``fit``, or another that cannot be launched.
            trainer: The trainer's settings, as the parser returns them.

        Raises:
            UserError: Ray is not installed; the command, the strategy or the devices are not for Ray; the address is
                none, or no one answers there.
        """
        if command != "fit":
            raise UserError(f"--launcher ray is for fit alone, got {command}: run it without --launcher")
        if importlib.util.find_spec("ray") is None:
            raise UserError(
                "--launcher ray needs the package 'ray', which is not installed: pip install \"miepo[ray]\""
            )
        strategy_on_ray(trainer.strategy)
        for name, one in (("devices", ("auto", 1, "1")), ("num_nodes", (1,))):
            if trainer[name] not in one:
                raise UserError(
                    f"with --launcher ray ray.num_workers counts the processes, on whichever machines they are: "
                    f"expected trainer.{name} {one[0]}, got {trainer[name]}"
                )
        device = trainer.accelerator
        if device not in ("auto", "cpu", *GPU):
            raise UserError(f"--launcher ray trains on CPUs and GPUs: expected trainer.accelerator auto, got {device}")
        if (device == "cpu" and self.gpus_per_worker) or (device in GPU and self.gpus_per_worker == 0):
            raise UserError(
                f"expected ray.gpus_per_worker {int(device in GPU)} with trainer.accelerator {device}, "
                f"got {self.gpus_per_worker}"
            )
        if trainer.logger in (None, True):
            raise UserError("--launcher ray goes on where the first logger writes: expected trainer.logger, got none")
        check_address(self._address)

    def launch(self, words: Any, trainer: Trainer, module: Any, data: Any, options: Any, continues: bool) -> None:
        """Run ``miepo WORDS`` on the workers, and wait for its end.

        Args:
            words: The command's own words.
            trainer: What they build here, which tells where the run logs.
            module: The same, of which rollout servers need the policy.
            data: The same, of which they need the engine.
            options: What the parser made of the words.
            continues: Whether the checkpoint to begin with is the run's own, in whose logs it goes on.

        Raises:
            UserError: the cluster has no room for the workers, the storage is of one machine, a mistake ended the run
                on a worker, or workers died too often.
        """
        import ray
        from ray.train.torch import TorchTrainer

        from miepo.cli.mistakes import outer_mistake

        train: Any = import_module("ray.train")  # whose types are those of its first version
        self._check_engine(data)
        servers: list[Any] = []
        began = self._connect()
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = self._gpus(options.trainer.accelerator, nodes)
            needs = {"CPU": self.cpus_per_worker, "GPU": gpus, **self.resources_per_worker}
            check_room(self.num_workers, needs, nodes)
            storage = storage_place(self.storage, str(trainer.default_root_dir), len(nodes))
            urls = ""
            if self.rollout_servers:
                server = self._server_command(trainer, module, data, bool(gpus))
                room = {"CPU": self.rollout_cpus, "GPU": gpus if self.rollout_gpus is None else self.rollout_gpus}
                rank_zero_info(f"Starting {self.rollout_servers} rollout servers")
                servers, addresses = start_servers(self.rollout_servers, *server, room, SERVER_PATIENCE)
                urls = ",".join(addresses)
            orders = {
                "urls": urls,
                "words": words,
                "folder": os.getcwd(),
                "checkpoint": options.ckpt_path,
                "continues": continues,
                "versions": pinned_versions(trainer),
                "gpu": bool(gpus),
            }
            run = TorchTrainer(
                run_worker,
                train_loop_config=orders,
                scaling_config=train.ScalingConfig(
                    num_workers=self.num_workers, use_gpu=bool(gpus), resources_per_worker=needs
                ),
                run_config=train.RunConfig(
                    name=f"miepo-{uuid4().hex[:12]}",  # a name that was there before would be gone on with
                    storage_path=storage,
                    failure_config=train.FailureConfig(
                        max_failures=self.max_failures, controller_failure_limit=STARTS - 1
                    ),
                    checkpoint_config=train.CheckpointConfig(num_to_keep=1),
                    callbacks=[ending_mistakes(self.max_failures)],
                    # or every mistake has its traceback before its sentence
                    logging_config=train.LoggingConfig(log_level="CRITICAL"),
                    worker_runtime_env={"env_vars": {k: os.environ[k] for k in HANDED_ON if k in os.environ}},
                ),
            )
            with _stopping():
                run.fit()
        except train.ControllerError as error:  # what was not tried again
            raise UserError(of_the_controller(error.controller_failure, self.num_workers)) from error
        except train.WorkerGroupError as error:
            failures = error.worker_failures.values()
            if said := next(filter(None, map(outer_mistake, failures)), None):
                raise UserError(said) from error
            if not any(map(died, failures)):
                raise
            raise UserError(
                f"a worker died more often than ray.max_failures {self.max_failures} allows: --ckpt_path last goes on "
                "from the last checkpoint"
            ) from error
        finally:
            if servers:
                stop_servers(servers)
            if began:
                ray.shutdown()

    def _check_engine(self, data: Any) -> None:
        """Refuse an engine that would not ask the servers that are to be started."""
        from miepo.rollout import ServerEngine

        engine = getattr(data, "engine", None)
        if self.rollout_servers and (not isinstance(engine, ServerEngine) or engine.urls is not None):
            got = type(engine).__name__ + (" with urls" if isinstance(engine, ServerEngine) else "")
            raise UserError(f"ray.rollout_servers needs data.engine ServerEngine without urls, got {got}")

    def _server_command(self, trainer: Trainer, module: Any, data: Any, gpu: bool) -> tuple[list[str], dict[str, str]]:
        """Return words and environment of a rollout server."""
        from miepo.cli import rollout_server

        if self.rollout_command is not None:
            return list(self.rollout_command), {}
        options = rollout_server.make_parser().parse_args(["--host", "0.0.0.0", "--python", self.rollout_python])
        options.port = PORT
        settings = rollout_server.settings_for(trainer, module, data, None)
        if gpu and module.policy.dtype == "auto":  # of this machine's CPU
            settings["dtype"] = "bfloat16"
        environment, line = rollout_server.command_line(options, settings, [], gpu)
        return line, environment

    @property
    def _address(self) -> str | None:
        return self.address or os.environ.get("RAY_ADDRESS") or None

    def _connect(self) -> bool:
        """Connect to the cluster, and return whether this process was not part of it before."""
        import ray

        if ray.is_initialized():
            return False
        try:
            ray.init(address=self._address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            got = f"'{self._address}'" if self._address else "none"
            raise UserError(f"expected a Ray cluster that can be reached, got {got}: {first_line(error)}") from error
        return True

    def _gpus(self, accelerator: str, nodes: Sequence[Mapping[str, float]]) -> int:
        if self.gpus_per_worker is not None or accelerator != "auto":
            return int(accelerator in GPU if self.gpus_per_worker is None else self.gpus_per_worker)
        return int(any(node.get("GPU", 0) >= 1 for node in nodes))


def strategy_on_ray(strategy: Any) -> tuple[str, dict[str, Any]]:
    """Return which of Ray's strategies a trainer's becomes, and with which settings.

    >>> strategy_on_ray("auto"), strategy_on_ray("sharded")
    (('ddp', {}), ('sharded', {}))

    Raises:
        UserError: it becomes none.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    if (kind := STRATEGIES.get(name)) is None:
        raise UserError(f"--launcher ray runs trainer.strategy auto, ddp or sharded, got {name}")
    settings = {} if isinstance(strategy, str) else dict(strategy.get("init_args") or {})
    return kind, {key: value for key, value in settings.items() if value is not None}


def check_address(address: str | None) -> None:
    """Refuse the address of a cluster where no one answers: Ray itself would try for minutes.

    >>> check_address(None)
    >>> check_address("local")

    Raises:
        UserError: it is no address, or no one answers.
    """
    if address in (None, "auto", "local"):
        return
    host, colon, port = str(address).rpartition(":")
    if not colon or not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"expected the address of a Ray cluster, HOST:PORT, auto or local, got '{address}'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"expected a Ray cluster at '{address}', got no answer: {error.strerror or first_line(error)}"
        ) from None


def check_room(workers: int, needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse more workers than a cluster would ever have room for: Ray would wait for them.

    >>> check_room(3, {"CPU": 2, "GPU": 0}, [{"CPU": 4.0}, {"CPU": 3.0}])

    Args:
        workers: How many.
        needs: The resources of one of them.
        nodes: The resources of each machine.

    Raises:
        UserError: there is no room, whatever else runs there.
    """
    wanted = {name: amount for name, amount in needs.items() if amount}
    room = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted.items()) for node in nodes)
    if workers > room:
        each = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        there = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes)
        raise UserError(
            f"expected ray.num_workers of at most {room}, got {workers}: each needs {each}, and the cluster has {there}"
        )


def storage_place(storage: str | None, root: str, machines: int) -> str:
    """Return where Ray keeps checkpoints, as it needs it: an absolute path or a URI.

    >>> storage_place("s3://bucket/runs", "runs", 2)
    's3://bucket/runs'

    Raises:
        UserError: the machines of the cluster do not share it.
    """
    if storage is not None and ("://" in storage or Path(storage).is_absolute()):
        return storage
    if machines > 1:
        got = "none" if storage is None else f"'{storage}'"
        raise UserError(
            f"the cluster has {machines} machines: expected ray.storage that all of them share, as an absolute path or "
            f"a URI, got {got}"
        )
    return str(Path(root if storage is None else storage).absolute() / ("ray_checkpoints" if storage is None else ""))


def of_the_controller(error: Exception, workers: int) -> str:
    """Say what ended a run on Ray's side."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__.startswith("WorkerGroupStartup"):
        return f"expected room for {workers} workers on the cluster, got none in {STARTS} tries: {first_line(error)}"
    return f"Ray's controller of the run failed: {type(error).__name__}: {first_line(error)}"


def pinned_versions(trainer: Trainer) -> list[dict[str, Any]]:
    """Return class and version of the loggers, so that workers that are started again log where the first did."""
    versions = [entry for entry in log_versions(trainer) if entry["class"] in PINNED]
    for entry in versions:
        if entry["class"] == "WandbLogger" and entry["version"] is None:
            entry["version"] = uuid4().hex[:8]  # W&B's would be drawn by each start anew
    return versions


PINNED = ("CSVLogger", "TensorBoardLogger", "WandbLogger")


@contextmanager
def _stopping() -> Iterator[None]:
    """End with the exit status of a signal: Ray's own answers are an abort and a 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        raise SystemExit  # another of which, without a number, comes out of Ray

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        number = asked[0] if asked else signal.SIGINT  # whose handler is Ray's
        said = f"Stopped by {signal.Signals(number).name}: --ckpt_path last goes on from the last checkpoint"
        rank_zero_info(said)
        raise Interrupted(number) from None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


# -- on a worker -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RayWorker:
    """What a worker does otherwise than the command that has launched it.

    Args:
        checkpoint: The one to begin with: the last that Ray knows, or the command's.
        versions: Class and version of the run's loggers.
        continues: Whether the logs have something that stays.
        gpu: Whether its device is a GPU.
    """

    checkpoint: str | None
    versions: Sequence[dict[str, Any]]
    continues: bool
    gpu: bool

    def trainer_settings(self, strategy: Any, plugins: Any) -> dict[str, Any]:
        """Return what Ray decides of a trainer.

        Args:
            strategy: As the configuration names it.
            plugins: Others of the trainer.
        """
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        kind, settings = strategy_on_ray(strategy)
        others = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
        return {
            "strategy": {DDP: RayDDPStrategy, SHARDED: RayShardedStrategy}[kind](**settings),
            "plugins": [*others, RayLightningEnvironment()],
            "accelerator": "gpu" if self.gpu else "cpu",
            "devices": "auto",
            "num_nodes": 1,
        }

    def prepare(self, trainer: Trainer) -> None:
        """Let Ray know of every checkpoint of the run."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCheckpoint):
                callback.after_save = report


class RayShardedStrategy(ShardedStrategy):
    """FSDP2 on the workers of Ray, which has put each on its device."""

    @property
    def root_device(self) -> torch.device:
        from ray.train.torch import get_device

        return get_device()


def run_worker(orders: dict[str, Any]) -> None:
    """Run the command on this worker, from the last checkpoint that Ray knows.

    Args:
        orders: What :meth:`RayLauncher.launch` hands over.

    Raises:
        UserError: a mistake of the user, as one sentence, which the launcher does not try again.
    """
    from ray import train

    from miepo.cli.mistakes import outer_mistake, user_error
    from miepo.cli.trainer import train as run_command

    folder = orders["folder"]
    if not os.path.isdir(folder):
        raise UserError(f"expected the command's folder on every machine of the cluster, got none at '{folder}'")
    os.chdir(folder)  # Ray has gone to one of its own
    if orders["urls"]:
        os.environ["MIEPO_ROLLOUT_URLS"] = orders["urls"]
    _quiet()
    if folder not in sys.path:
        sys.path.append(folder)
    reported = train.get_checkpoint()
    with reported.as_directory() if reported else nullcontext() as place:
        checkpoint = str(Path(place) / "last.ckpt") if place else orders["checkpoint"]
        continues = bool(place) or orders["continues"]
        try:
            run_command(orders["words"], RayWorker(checkpoint, orders["versions"], continues, orders["gpu"]))
        except Exception as error:
            # what a network or a disk could not do may be possible at the next start
            mistake = user_error(error) or (None if isinstance(error, OSError) else outer_mistake(error))
            if mistake is None or os.environ.get("MIEPO_TRACEBACK"):
                raise
            raise UserError(str(mistake)) from None  # alone: what it was raised from may not travel


def report(trainer: Trainer, path: Path) -> None:
    """Tell Ray of a checkpoint and the newest figures; every worker calls this at the same step.

    Args:
        trainer: Of the run.
        path: The checkpoint, which the first worker has written.
    """
    from ray import train

    figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
    figures = {key: value for key, value in figures.items() if math.isfinite(value)}
    figures |= {"step": trainer.global_step, "epoch": trainer.current_epoch}
    if trainer.is_global_zero:
        with _alone(path) as folder:
            train.report(figures, checkpoint=train.Checkpoint.from_directory(folder))
    else:
        train.report(figures)


def _quiet() -> None:
    """Leave out that Ray says of every report all that was reported: the logger of that bears a file's name."""
    for name in list(logging.root.manager.loggerDict):
        if name.endswith("context.py") and f"ray{os.sep}train" in name:
            logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _alone(path: Path) -> Iterator[str]:
    """Hold a file in a folder of its own: Ray takes whole folders, and others may keep checkpoints beside it."""
    folder = path.parent / ".reported"
    shutil.rmtree(folder, ignore_errors=True)  # of a worker that died
    folder.mkdir()
    try:
        os.link(path, folder / path.name)
    except OSError:  # a file system without links
        shutil.copyfile(path, folder / path.name)
    yield str(folder)
    shutil.rmtree(folder, ignore_errors=True)
