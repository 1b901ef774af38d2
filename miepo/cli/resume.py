"""How a configuration goes on with the run it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from miepo.errors import UserError


def last_checkpoint(trainer: Any) -> str | None:
    """Return the newest ``checkpoints/last.ckpt`` among the runs of this configuration's first logger."""
    entry = _loggers(trainer.logger)[:1]
    if trainer.logger is False:
        runs = [Path(trainer.default_root_dir or ".")]
    elif not entry:
        raise UserError("--ckpt_path last looks where the first logger writes: expected trainer.logger, got none")
    else:
        options = entry[0].get("init_args") or {}
        name = options.get("project") if entry[0].class_path.endswith("WandbLogger") else options.get("name")
        folder = Path(options.get("save_dir") or trainer.default_root_dir or ".") / str(name or "")
        version = options.get("version")
        runs = list(
            folder.glob("*" if version is None else f"version_{version}" if isinstance(version, int) else version)
        )
    found = [path for run in runs if (path := run / "checkpoints" / "last.ckpt").is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def continue_logs(loggers: Any, versions: Sequence[dict[str, Any]], resume: bool = True) -> None:
    """Set the loggers of a configuration to go on where those of a run, by class and version, were.

    Args:
        loggers: The trainer's, as the parser returns them.
        versions: Of the run.
        resume: Whether what was logged there stays.
    """
    remaining = list(versions)
    for entry in _loggers(loggers):
        kind = entry.class_path.rpartition(".")[2]
        found = next((v for v in remaining if v["class"] == kind), None)
        if found is None:
            continue
        remaining.remove(found)  # of two loggers of one class each has its own
        version = found["version"]
        entry.init_args = entry.get("init_args") or Namespace()
        if kind == "WandbLogger":
            entry.init_args["id"], entry.init_args["resume"] = version, "allow"
        else:
            entry.init_args["version"] = version
        if kind == "CSVLogger":
            entry.init_args["resume"] = resume


def _loggers(entries: Any) -> list[Any]:
    return [e for e in (entries if isinstance(entries, list) else [entries]) if hasattr(e, "class_path")]
