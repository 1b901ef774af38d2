"""A study: methods x seeds, each run one ``miepo fit`` in a process of its own, resumable, at equal work."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

import yaml
from tqdm import tqdm

from miepo.cli.command import main
from miepo.errors import UserError, first_line
from tools.study import rows
from tools.study.record import EVALUATIONS, RESULT, ROOT
from tools.study.rows import Rows

FAILED, LOG, READY, FINGERPRINT = "failed.txt", "log.txt", "ready", "fingerprint.txt"
LOCK = Lock()  # runs end in threads of their own
KEYS = {
    "prepare", "config", "set", "seeds", "baseline", "metrics", "methods", "true_front", "processes", "threads",
    "at_equal_kl",
}  # fmt: skip

# what a report can show: name -> (logged key, title, better when)
METRICS = {
    "slope": ("slope/*", "slope", "up"),  # a column for each objective: along its own weight, sd
    "median_slope": ("median_slope", "median slope", "up"),  # over objectives
    "side": ("side/*", "side effect", ""),  # of a weight on another objective, sd
    "hv_corrected": ("front/hv_corrected", "HV", "up"),  # without the bias that resampling the prompts shows
    "hv": ("front/hv", "HV with its bias", "up"),
    "mip": ("front/mip", "MIP", "up"),
    "crd": ("front/crd", "CRD", "down"),
    "information": ("information/preference", "I(Y;W|X), nats", "up"),
    "sd": ("front/sd/*", "sd", "down"),
    "overlap": ("overlap", "overlap", "down"),
    "kl": ("kl", "KL, nats", ""),
    "length": ("length", "tokens", ""),
    "finished": ("finished", "finished", "up"),
    "seconds": ("seconds", "seconds", ""),
}


@dataclass(frozen=True)
class Method:
    """One row of the table: what is added to the study's configuration."""

    name: str
    label: str
    config: Sequence[Path] = ()
    set: dict[str, Any] = field(default_factory=dict)
    controls: Sequence[str] = ()  # further methods it is compared with, seed by seed


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    config: Path
    methods: dict[str, Method]
    seeds: Sequence[int]
    baseline: str
    metrics: Sequence[str]
    set: dict[str, Any]
    prepare: str | None
    true_front: str | None
    processes: int
    threads: int
    rows: Path  # where the rows of finished runs are kept
    machine: dict[str, Any] = field(default_factory=dict)  # where runs compute, and in which type; their rows name both
    at_equal_kl: Sequence[str] = ()  # methods that are also compared at the baseline's distance from the reference


@dataclass(frozen=True)
class Run:
    """One method with one seed, and the folder that it works in."""

    method: Method
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method.name}, seed {self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        return self.method.name, self.seed

    @property
    def ended(self) -> bool:
        """Whether it ended well in its folder."""
        return (self.folder / RESULT).exists()

    @property
    def fingerprint(self) -> str | None:
        path = self.folder / FINGERPRINT
        return path.read_text() if path.exists() else None

    @property
    def failure(self) -> str | None:
        path = self.folder / FAILED
        return path.read_text().strip() if path.exists() and not self.ended else None


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: names the key or method that cannot be used.
    """
    if not path.is_file():
        raise UserError(f"expected a study file at '{path}': there is none")
    values = _yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of {', '.join(sorted(KEYS))}, got {type(values).__name__}")
    if unknown := sorted(values.keys() - KEYS):
        raise UserError(f"{path}: expected the keys {', '.join(sorted(KEYS))}, got {', '.join(unknown)}")
    if missing := sorted({"config", "seeds", "baseline", "methods"} - values.keys()):
        raise UserError(f"{path}: expected the keys {', '.join(missing)}, got none")
    if not isinstance(values["methods"], dict) or not values["methods"]:
        raise UserError(f"{path}: expected methods by name, got {values['methods']!r}")
    methods = {str(name): _method(path, str(name), entry) for name, entry in values["methods"].items()}
    named_controls = [(f"methods.{m.name}.control", control) for m in methods.values() for control in m.controls]
    for name, wanted in [("baseline", values["baseline"]), *named_controls]:
        if not isinstance(wanted, str) or wanted not in methods:
            raise UserError(f"{path}: {name} names the unknown method '{wanted}': there are {', '.join(methods)}")
    metrics = values.get("metrics", list(METRICS))
    if not isinstance(metrics, list):
        raise UserError(f"{path}: metrics must be a list of {', '.join(METRICS)}, got {metrics!r}")
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UserError(f"{path}: unknown metric {', '.join(map(str, unknown))}: there are {', '.join(METRICS)}")
    moved = values.get("at_equal_kl", [])
    if not isinstance(moved, list) or any(name not in methods for name in moved):
        raise UserError(f"{path}: at_equal_kl must be a list of methods, of {', '.join(methods)}, got {moved!r}")
    seeds = list(range(values["seeds"])) if isinstance(values["seeds"], int) else values["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"{path}: seeds must be a number of seeds or a list of them, got {values['seeds']!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: expected different seeds, got {seeds}")
    for key in ("processes", "threads"):
        if not isinstance(values.get(key, 1), int) or values.get(key, 1) < 1:
            raise UserError(f"{path}: {key} must be a number of at least 1, got {values[key]!r}")
    _settings(path, "set", values.get("set"))
    return Study(
        path.stem, _file(path, values["config"]), methods, seeds, values["baseline"], metrics, values.get("set") or {},
        values.get("prepare"), values.get("true_front"), values.get("processes", 1), values.get("threads", 1),
        path.with_suffix(".jsonl"), at_equal_kl=moved,
    )  # fmt: skip


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, got text that is not: {first_line(error)}") from None


def _method(path: Path, name: str, entry: Any) -> Method:
    entry = entry or {}
    keys = {"label", "config", "set", "control"}
    if not isinstance(entry, dict) or entry.keys() - keys:
        got = ", ".join(sorted(entry.keys() - keys)) if isinstance(entry, dict) else repr(entry)
        raise UserError(f"{path}: method '{name}' takes {', '.join(sorted(keys))}, got {got}")
    files, controls = entry.get("config") or [], entry.get("control") or []
    controls = [controls] if isinstance(controls, str) else controls
    for key, value in (("config", files), ("control", controls)):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{path}: methods.{name}.{key} must be a list of names, got {value!r}")
    _settings(path, f"methods.{name}.set", entry.get("set"))
    files = [_file(path, f) for f in files]
    return Method(name, entry.get("label", name), files, entry.get("set") or {}, controls)


def _settings(path: Path, key: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {key} must map settings to values, got {value!r}")


def _file(path: Path, name: Any) -> Path:
    if not isinstance(name, str) or not (ROOT / name).is_file():
        raise UserError(f"{path}: expected a configuration at '{name}', relative to the project: there is none")
    return ROOT / name


def runs_of(study: Study, folder: Path) -> list[Run]:
    """Return all runs, seed by seed, so that a study that is cut short has whole comparisons."""
    return [Run(m, seed, folder / m.name / f"seed_{seed}") for seed in study.seeds for m in study.methods.values()]


def arguments(study: Study, run: Run, folder: Path) -> list[str]:
    """Return what follows ``miepo`` in the command of a run."""
    result = ["fit", "--config", str(study.config)]
    for file in run.method.config:
        result += ["--config", str(file)]
    record = {"class_path": "tools.study.record.Record", "init_args": {"folder": str(run.folder)}}
    values = (
        study.set
        | run.method.set
        | study.machine
        | {"seed_everything": run.seed, "trainer.default_root_dir": str(run.folder)}
    )
    values["trainer.callbacks+"] = record
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        result += [f"--{key}", text.replace("{parts}", str(folder / "parts"))]
    return result


def prepare(study: Study, folder: Path) -> None:
    """Make what all runs share, once."""
    parts = folder / "parts"
    if study.prepare is None or (parts / READY).exists():
        return
    parts.mkdir(parents=True, exist_ok=True)
    named(study.prepare)(parts)
    (parts / READY).touch()


def named(path: str) -> Any:
    """Return the object at an import path ``module.name``."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"expected a function at '{path}': {error}") from None


def parts_hash(folder: Path) -> str:
    """Hash what all runs share, a base model and its data; the same for all studies that prepare nothing."""
    digest = hashlib.sha256()
    for part in sorted(p for p in (folder / "parts").rglob("*") if p.is_file()):
        digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(study: Study, run: Run) -> str:
    """Hash the settings of a run and the configurations that they name, in whatever folder and on whatever machine."""
    given = arguments(replace(study, machine={}), replace(run, folder=Path(run.method.name, str(run.seed))), Path())
    values = [(f, _yaml(Path(a)) if f == "--config" else a) for f, a in zip(given[1::2], given[2::2], strict=True)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def fingerprints(study: Study, folder: Path) -> dict[tuple[str, int], str]:
    """Return the fingerprint that each run has now."""
    return {run.key: fingerprint(study, run) for run in runs_of(study, folder)}


def execute(study: Study, folder: Path) -> tuple[Rows, list[str]]:
    """Run what has no rows yet, ``processes`` at a time, and read the rows of all finished runs.

    Each run is a process of its own, forked from one that has imported everything, which saves it ten seconds. A
    crashed run does not stop the others.

    Returns:
        The rows, and sentences about what was left out.

    Raises:
        UserError: a finished run had other settings than it would have now, or its prepared parts were others; the rows
            cannot be written; another process is at work in the folder.
    """
    rows.check_writable(study.rows)
    with _alone(folder):
        prints = fingerprints(study, folder)
        found, _ = rows.read(study.rows, prints)
        missing = [run for run in runs_of(study, folder) if run.key not in found]
        if missing:
            prepare(study, folder)
            parts = parts_hash(folder)
            if {row[0].get("parts", parts) for row in found.values()} - {parts}:
                raise UserError(
                    f"{study.rows} holds rows of runs with another base model or other data than those in "
                    f"'{folder / 'parts'}': expected the folder 'parts' of those runs there, or another file (--rows)"
                )
            _run_all(study, folder, [(run, prints[run.key]) for run in missing], parts)
    return rows.read(study.rows, prints)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"expected no other study at work in '{folder}': there is one") from None
        yield


def _run_all(study: Study, folder: Path, missing: Sequence[tuple[Run, str]], parts: str) -> None:
    ended = [(run, now) for run, now in missing if run.ended]
    for run, now in ended:  # it was stopped before it kept them
        if run.fingerprint != f"{now} {parts}":
            raise UserError(
                f"{run.folder} holds a run of other settings than {run.name} has now: "
                "expected an empty folder for a changed study (--out), or the old runs removed"
            )
        keep(study, run, now, parts)
    missing = [pair for pair in missing if pair not in ended]
    os.environ |= {
        "OMP_NUM_THREADS": str(study.threads), "MKL_NUM_THREADS": str(study.threads), "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"), "MPLBACKEND": "Agg",
    }  # fmt: skip
    context = get_context("forkserver")
    context.set_forkserver_preload(["miepo.cli", "tools.study.record"])
    running: set[Any] = set()
    stopped = Event()

    def one(run: Run, now: str) -> Run:
        if stopped.is_set():
            return run
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in (FAILED, LOG, RESULT):
            (run.folder / name).unlink(missing_ok=True)
        (run.folder / FINGERPRINT).write_text(f"{now} {parts}")
        process = context.Process(target=fit, args=(arguments(study, run, folder), run.folder / LOG))
        process.start()
        running.add(process)
        if stopped.is_set():  # stopped while this one started, so that it may not be among those that were killed
            process.kill()
        process.join()
        running.discard(process)
        if run.ended:
            keep(study, run, now, parts)
        elif not stopped.is_set():
            (run.folder / FAILED).write_text(f"exit status {process.exitcode}: {_last_line(run.folder / LOG)}\n")
        return run

    pool = ThreadPoolExecutor(study.processes)
    try:
        finished: SimpleQueue[Future[Run]] = SimpleQueue()  # a signal may come while one waits at it
        for run, now in missing:
            pool.submit(one, run, now).add_done_callback(finished.put)
        total = len(study.methods) * len(study.seeds)
        with tqdm(total=total, initial=total - len(missing), unit="run", desc=study.name) as bar:
            for _ in missing:
                run = finished.get().result()
                if run.failure:
                    bar.write(f"failed: {run.name}: {run.failure}")
                bar.update()
    finally:  # an interrupted study leaves no process behind; what has finished is kept
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.kill()  # a result is whole or not there at all, so there is nothing to wait for


def keep(study: Study, run: Run, now: str, parts: str) -> None:
    """Add a run that has ended to the study's rows.

    Raises:
        UserError: what it wrote cannot be read.
    """
    made_of = {"method": run.method.name, "seed": run.seed, "fingerprint": now, "parts": parts}
    try:
        result = json.loads((run.folder / RESULT).read_text())
        each = [json.loads(line) for line in (run.folder / EVALUATIONS).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run.folder} holds a broken run, expected it whole or removed: {first_line(error)}") from None
    head = {key: result.get(key) for key in ("names", *rows.ORIGIN) if key not in made_of}
    with LOCK:
        rows.append(study.rows, made_of | head | {"evaluations": each})


def fit(command: Sequence[str], log: Path) -> None:
    """Run ``miepo`` with these arguments, in this process, with everything it prints in a file."""
    if sys.platform == "linux":  # a study that is killed takes its runs with it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with log.open("w") as file:
        file.write(" ".join(["miepo", *command]) + "\n")
        file.flush()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(ROOT)
    main(list(command))


def _last_line(path: Path) -> str:
    if not path.exists():
        return "no output"
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
