"""All that miepo takes of Lightning's private parts: each has a contract test, and pyproject bounds the versions.

Names that a subclass overrides stay where the subclass is, and are listed here.
"""

from __future__ import annotations

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy

# overridden or read by a subclass: class -> names
OVERRIDDEN: dict[type, tuple[str, ...]] = {
    LightningCLI: ("_parse_ckpt_path", "_run_subcommand", "_instantiate_trainer", "_get"),
    _ExperimentWriter: ("_check_log_dir_exists", "_rewrite_with_new_header"),
    ModelParallelStrategy: ("_setup_distributed",),
}
# set by the constructor: class -> names
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    CSVLogger: ("_experiment",),
    LightningCLI: ("_subcommand_parsers",),
    WandbLogger: ("_experiment", "_wandb_init"),
    ModelParallelStrategy: ("_data_parallel_size",),
}


def forget_restart(trainer: Trainer) -> None:
    """Let the next epoch begin as any other: Lightning would skip its batches after a restart between two epochs."""
    trainer.fit_loop._restarting = trainer.fit_loop.epoch_loop.restarting = False


def count_steps_as_logged(trainer: Trainer) -> None:
    """Set the step under which the next figures are logged: a resume after an evaluation counts one too many."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def accumulates(trainer: Trainer) -> bool:
    """Return whether gradients wait for further batches before a step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()
