"""Checkpoints: a file of this name is whole, or it is not there; an adapter fits the policy, or it is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from miepo.errors import UserError, first_line

if TYPE_CHECKING:
    from miepo.policy import Policy


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


# what is read of a checkpoint: by all who read one, by a run that goes on, by whoever finds it
WHOLE = {"state_dict": dict, "pytorch-lightning_version": str, "miepo": dict}
TRAINING = {"callbacks": dict, "loops": dict, "optimizer_states": list, "lr_schedulers": list}
PROGRESS = ("ready", "started", "processed", "completed")
OURS = {"schema": int, "objectives": list, "base": str, "policy": dict}
IF_THERE = {"config": (dict, type(None)), "fingerprint": (str, type(None))}


def read_checkpoint(path: Path, device: str = "cpu", resume: bool = False) -> dict[str, Any]:
    """Return a checkpoint as data: nothing in it is executed, and what is read of it has its type.

    Args:
        path: The file.
        device: Of its tensors.
        resume: Whether training goes on from it.

    Raises:
        UserError: the file is no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # torch raises many kinds, all of them about this file
        raise UserError(f"expected a checkpoint at '{path}', got a file that is none: {first_line(error)}") from None
    if not isinstance(checkpoint, dict):
        raise _another(path, f"a {type(checkpoint).__name__}")
    _check_kinds(path, checkpoint, WHOLE | (TRAINING if resume else {}))
    if resume:
        _check_kinds(path, checkpoint["callbacks"], dict.fromkeys(checkpoint["callbacks"], dict), "callbacks.")
        _check_progress(path, checkpoint["loops"])
    saved = checkpoint["miepo"]
    _check_kinds(path, saved, OURS | {key: kind for key, kind in IF_THERE.items() if key in saved}, "miepo.")
    if not all(isinstance(name, str) for name in saved["objectives"]):
        raise _another(path, f"one with objectives {saved['objectives']}")
    if not all(isinstance(weight, Tensor) for weight in checkpoint["state_dict"].values()):
        raise _another(path, "one whose weights are no tensors")
    return checkpoint


def _another(path: Path, got: str) -> UserError:
    return UserError(f"expected a checkpoint of miepo at '{path}', got {got}")


def _check_kinds(path: Path, found: Mapping[str, Any], kinds: Mapping[str, Any], where: str = "") -> None:
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            got = f"with {where}{key} of type {type(found[key]).__name__}" if key in found else f"without {where}{key}"
            raise _another(path, f"one {got}")


def _check_progress(path: Path, loops: Mapping[str, Any]) -> None:
    """Refuse loops without the counts of what was done."""
    where = "loops.fit_loop."
    _check_kinds(path, loops, {"fit_loop": dict}, "loops.")
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        _check_kinds(path, loops["fit_loop"], {name: dict}, where)
        _check_kinds(path, loops["fit_loop"][name], {"total": dict, "current": dict}, f"{where}{name}.")
        for part in ("total", "current"):
            counts = loops["fit_loop"][name][part]
            _check_kinds(path, counts, dict.fromkeys(PROGRESS, int), f"{where}{name}.{part}.")
            if min(counts.values()) < 0:
                raise _another(path, f"one with {where}{name}: {counts}")


def check_adapter(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse an adapter in which a weight is missing, unknown or of another shape."""
    shapes = {name: (_shape(expected, name), _shape(found, name)) for name in sorted(expected.keys() | found.keys())}
    if wrong := [name for name, (shape, got) in shapes.items() if shape != got]:
        shape, got = shapes[wrong[0]]
        raise UserError(
            f"the checkpoint's adapter does not fit the policy: {len(wrong)} of {len(expected)} weights differ, "
            f"first {wrong[0]}: expected shape {shape}, got {got}"
        )


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "no such weight"


def check_base(policy: Policy, base: str, fingerprint: str | None) -> None:
    """Refuse an adapter of another base model; one that does not know its base's weights is taken by name."""
    if fingerprint is not None and fingerprint != policy.fingerprint:
        raise UserError(
            f"the adapter was trained on another base model: expected the weights of '{base}', "
            f"got those of '{policy.base}', which are others"
        )
    if fingerprint is None and base != policy.base:
        rank_zero_warn(f"the adapter was trained on the base '{base}', the config has '{policy.base}'")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return settings that differ, by their dotted names: what was and what is; None where there is none."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes |= config_changes(old, new, f"{path}{key}.")
        elif old != new:
            changes[f"{path}{key}"] = (old, new)
    return changes
