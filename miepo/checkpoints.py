"""Checkpoints on disk: a file of this name is whole, or it is not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits until the disk has it, and renames it.

    A process that dies at any moment leaves the old checkpoint or the new one. What it may leave besides is a file
    ``.NAME.partial``, which nothing reads and the next checkpoint of that name replaces.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # a remote store has its own way to be atomic
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
        if hasattr(os, "O_DIRECTORY"):  # the name, too, must outlive a loss of power
            folder = os.open(place.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by their dotted names: what was and what is; None where there is none."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes |= config_changes(old, new, f"{path}{key}.")
        elif old != new:
            changes[f"{path}{key}"] = (old, new)
    return changes
