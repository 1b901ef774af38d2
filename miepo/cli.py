"""``miepo fit | validate | test | predict --config ..``: LightningCLI with objectives and errors in one sentence."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from miepo.callbacks import ResponseWriter
from miepo.datamodule import OnlinePreferenceDataModule
from miepo.errors import UserError
from miepo.module import MIEPO
from miepo.objectives import Objective


class LogConfig(SaveConfigCallback):
    """Saves the configuration with the run and gives all of it to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class MiepoCLI(LightningCLI):
    """LightningCLI with ``objectives:``, which joins the trainer's callbacks, and ``writer:`` for predictions."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--objectives", type=list[Objective], default=[], help="The objectives, in column order.")
        parser.add_lightning_class_args(ResponseWriter, "writer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_data_seed)

    def before_instantiate_classes(self) -> None:
        path = self._get(self.config, "ckpt_path") if self.subcommand else None
        if path and path not in ("best", "last", "hpc") and ":" not in path and not Path(path).is_file():
            raise UserError(f"expected a checkpoint at '{path}': there is none")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend(self._get(self.config_init, "objectives") or [])  # type: ignore[attr-defined]
        return trainer


def _data_seed(seed: bool | int | None) -> int:
    return 0 if seed is None or isinstance(seed, bool) else seed


def main(args: ArgsType = None) -> None:
    """The command. A user's mistake ends in one sentence and exit status 2; ``MIEPO_TRACEBACK=1`` shows where."""
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the user's own objectives, beside the configuration
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # prompts are in memory
    warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")  # peft, not ours
    try:
        MiepoCLI(
            MIEPO,
            OnlinePreferenceDataModule,
            save_config_callback=LogConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"description": "Train and use a policy for every trade-off between objectives."},
            args=args,
        )
    except Exception as error:
        mistake = _user_error(error)
        if mistake is None or os.environ.get("MIEPO_TRACEBACK"):
            raise
        print(f"miepo: error: {mistake}", file=sys.stderr)
        sys.exit(2)


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception: the parser wraps what a constructor raises in errors of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
