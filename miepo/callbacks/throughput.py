"""Where the time goes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from miepo.recorded import Recorded
from miepo.types import PreferenceBatch, SupervisedBatch


class Throughput(Recorded, Callback):
    """Logs seconds per batch and its parts, response tokens per second, and peak memory in GB.

    ``time/step`` runs from the end of one batch to the end of the next, so it holds the rollout; evaluations between
    two batches are left out.
    """

    def __init__(self) -> None:
        self.mark: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.mark = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.mark = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PreferenceBatch | SupervisedBatch,
        batch_idx: int,
    ) -> None:
        now, values = perf_counter(), {}
        if isinstance(batch, PreferenceBatch):  # sampled for this step
            values = {f"time/{key}": value for key, value in batch.seconds.items()}
            tokens = int(batch.responses.tokens.mask.sum())
            values["tokens_per_second/sampling"] = tokens / max(batch.seconds["sampling"], 1e-9)
            if self.mark is not None:
                values["tokens_per_second/step"] = tokens / (now - self.mark)
        if self.mark is not None:
            values["time/step"] = now - self.mark
        values["memory/peak_gb"] = peak_memory(pl_module.device)
        pl_module.log_dict(values, batch_size=len(batch))
        self.mark = now


def peak_memory(device: torch.device) -> float:
    """Return peak memory in GB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says counts the process that started this one, too, if that was larger
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    # kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
