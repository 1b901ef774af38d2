"""A CSV log that a resumed run continues."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment


class CSVLogger(LightningCSVLogger):
    """Lightning's CSV logger, which otherwise deletes the file of the version that it is told to continue."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment

    def forget_from(self, step: int) -> None:
        """Drops rows of ``step`` and later: what was logged after the checkpoint comes again."""
        writer = self.experiment
        if isinstance(writer, _ContinuedWriter):  # on the process that logs
            writer.forget_from(step)


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        if self.file.exists():
            with self.file.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """It may exist."""

    def forget_from(self, step: int) -> None:
        if not self.file.exists():
            return
        with self.file.open(newline="") as file:
            # a row that a crash cut short is of a step that comes again
            rows = [
                row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) < step
            ]
        partial = self.file.with_name(f".{self.file.name}.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.file)
