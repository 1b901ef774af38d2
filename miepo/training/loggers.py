"""A CSV log that a crash leaves whole and a resumed run continues; W&B without warnings that no one asked for.

A run that a mistake ends before it has measured anything leaves no folder of either.
"""

from __future__ import annotations

import csv
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.wandb import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

SETTINGS = {"config.yaml", "hparams.yaml"}  # what is written before anything is done


class CSVLogger(LightningCSVLogger):
    """Lightning's CSV logger, whose file a crash leaves whole, and which can go on with the file of a version.

    Args:
        resume: Go on with the file of the version that is named; without it that file is deleted.
        kwargs: Of Lightning's.
    """

    def __init__(self, save_dir: str, resume: bool = False, **kwargs: Any) -> None:
        super().__init__(save_dir, **kwargs)
        self._continues = resume
        self._made: list[Path] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._made = _missing(Path(self.log_dir))
            self._experiment = _Writer(self.log_dir, self._continues)
        return self._experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; take a new folder back that has nothing but settings when a mistake ends the run."""
        super().finalize(status)
        folder = Path(self.log_dir)
        if status == "failed" and folder in self._made and {file.name for file in folder.glob("*")} <= SETTINGS:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(self._made)

    def forget_from(self, step: int) -> None:
        """Drop rows of ``step`` and later: what was logged after the checkpoint comes again."""
        writer = self.experiment
        if isinstance(writer, _Writer):  # on the process that logs
            writer.forget_from(step)


class WandbLogger(LightningWandbLogger):
    """Lightning's W&B logger, without the warnings that W&B has for what Lightning does.

    Args:
        kwargs: Of Lightning's.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._made: list[Path] = []
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # W&B warns of it, whatever it is

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and self.save_dir is not None:
            self._made = _missing(Path(self.save_dir) / "wandb")
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)  # W&B looks for a repository around it
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do as Lightning does; take an offline run back that has logged nothing when a mistake ends it."""
        super().finalize(status)
        run = self._experiment
        if status != "failed" or run is None or not run.offline or run.step:
            return
        folder = Path(run.dir).parent
        with redirect_stderr(StringIO()):  # how to send to the server what is about to go
            run.finish(exit_code=1)
        shutil.rmtree(folder, ignore_errors=True)
        others = sorted(folder.parent.glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
        for link in folder.parent.glob("*"):
            if link.is_symlink() and not link.exists():  # W&B's, of the newest run
                target = str(link.readlink())
                link.unlink()
                if others:
                    link.symlink_to(target.replace(folder.name, others[-1].name))
        _remove_empty(self._made)


def _missing(folder: Path) -> list[Path]:
    """Return those of a folder and the folders around it that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, continues: bool) -> None:
        self._continues = continues
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        if continues and self.file.exists():
            with self.file.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        if not self._continues:
            super()._check_log_dir_exists()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with self.file.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self._rewrite(fieldnames, rows)

    def forget_from(self, step: int) -> None:
        if not self.file.exists():
            return
        with self.file.open(newline="") as file:
            # a row that a crash cut short is of a step that comes again
            rows = [
                row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) < step
            ]
        self._rewrite(self.metrics_keys, rows)

    def _rewrite(self, keys: list[str], rows: list[dict[str, Any]]) -> None:
        partial = self.file.with_name(f".{self.file.name}.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.file)
