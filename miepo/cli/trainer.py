"""LightningCLI with objectives: ``miepo fit | validate | test | predict``."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from miepo.callbacks import EvaluationRecord, ProgressLog, ResponseWriter, RunCheckpoint
from miepo.cli.mistakes import construction_error, outer_mistake, user_error
from miepo.cli.parser_messages import one_sentence
from miepo.cli.quiet import quiet
from miepo.cli.resume import _loggers, continue_logs, last_checkpoint
from miepo.data.module import OnlinePreferenceDataModule
from miepo.errors import NoBase, UserError, first_line
from miepo.methods.base import PolicyModule
from miepo.methods.mi_epo import MIEPO
from miepo.objectives import Objective
from miepo.plugins import load_plugins
from miepo.policy import Policy
from miepo.policy.base_model import base_folder
from miepo.renamed import current_settings
from miepo.resources import is_file
from miepo.training.checkpoint_io import read_checkpoint
from miepo.training.ray_launcher import UNUSED_DEVICES, RayLauncher, RayWorker
from miepo.training.reporting import run_folder
from miepo.training.run_checkpoint import loggers_of

OBJECTIVES_HELP = """
How objectives are given: a list in a configuration, each with its class and what it is built with, such as

  objectives:
    - class_path: miepo.objectives.Brevity
      init_args: {characters: 40}

miepo objectives lists the classes. --objectives.help CLASS_PATH shows the settings of one; --model.help,
--model.policy.help, --model.exploration.help, --data.help and --trainer.callbacks.help do so for other classes.
"""

# how a command runs, and not what: a checkpoint is the same under every launcher
NOT_OF_THE_RUN = ("ckpt_path", "weights_only", "launcher", "ray")

_load = get_loader("yaml")


def _load_current(text: str) -> Any:
    return current_settings(_load(text))


set_loader("yaml", _load_current, (yaml.YAMLError,))


class DefaultsParser(LightningArgumentParser):
    """Says a mistake in one sentence, and in its help the settings of MIEPO, of the policy and of the data.

    Those are not in the help by themselves, since the parser takes any class there.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the user has to mend."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(one_sentence(message)) from ex

    def format_help(self, *args: Any) -> str:
        text = super().format_help(*args)
        if not self.callback_keys:  # the parser of all commands
            return text
        parser = ArgumentParser(usage=SUPPRESS, add_help=False)
        parser.add_class_arguments(MIEPO, "model", skip={"policy"}, fail_untyped=False)
        parser.add_class_arguments(Policy, "model.policy.init_args", fail_untyped=False)
        # the seed is --seed_everything's
        parser.add_class_arguments(OnlinePreferenceDataModule, "data", skip={"seed"}, fail_untyped=False)
        return f"{text.rstrip()}\n\n{parser.format_help().strip()}\n{OBJECTIVES_HELP}"


class LogConfig(SaveConfigCallback):
    """Saves the configuration with the run and gives all of it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.save_to_log_dir = trainer.log_dir is not None  # a logger may have no folder of its own
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        own = {key: value for key, value in config.items() if key not in NOT_OF_THE_RUN}
        pl_module.config = own | {"trainer": {k: v for k, v in config["trainer"].items() if k != "logger"}}
        if not self.save_to_log_dir:
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / self.config_filename), skip_none=False, overwrite=True)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(config)
            except OSError:
                raise  # of its files
            except Exception as error:  # an account, a server, a name: whatever its library raises
                raise UserError(f"trainer.logger {type(logger).__name__} takes no run: {first_line(error)}") from error


class MiepoCLI(LightningCLI):
    """LightningCLI with ``objectives:``, which joins the trainer's callbacks, and ``writer:`` for predictions.

    ``model`` and ``data`` may name a ``class_path``, for a method that brings its own; without one their settings are
    those of MIEPO and OnlinePreferenceDataModule.

    Args:
        worker: What is otherwise on a worker of Ray, where this is one.
        kwargs: Of LightningCLI.
    """

    began = False  # whether everything was built: what goes wrong before is the configuration's

    def __init__(self, worker: RayWorker | None = None, **kwargs: Any) -> None:
        load_plugins()
        self.worker = worker
        self.launcher: RayLauncher | None = None
        self.continues = False  # in the logs of the run that it goes on with
        super().__init__(
            PolicyModule,
            LightningDataModule,
            parser_class=DefaultsParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # a tuple, since of two lists the parser lets each entry of the second keep what the first says of its place
        parser.add_argument(
            "--objectives", type=tuple[Objective, ...], default=(), help="The objectives, in column order."
        )
        parser.add_argument(
            "--launcher",
            type=Literal["ray"] | None,
            default=None,
            help="Who starts the processes of fit: ray, with the settings --ray.NAME; by default the command is one.",
        )
        parser.add_class_arguments(RayLauncher, "ray")
        parser.add_lightning_class_args(ResponseWriter, "writer")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EvaluationRecord, "record")
        parser.add_lightning_class_args(ProgressLog, "progress")
        parser.set_defaults({"trainer.enable_model_summary": False})  # PolicyModule says what trains
        defaults = {"model": MIEPO, "data": OnlinePreferenceDataModule}
        parser.set_defaults({key: {"class_path": f"miepo.{value.__name__}"} for key, value in defaults.items()})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_data_seed)

    def _parse_ckpt_path(self) -> None:
        """Find and check the checkpoint before anything is built; nothing in it changes the configuration.

        ``last`` is the newest run's, which ``fit`` continues where it logs.
        """
        options: Any = self.config[self.config.subcommand] if self.config.get("subcommand") else {}
        if self.worker is not None:
            options["launcher"], options["ckpt_path"] = None, self.worker.checkpoint
        elif options and options.launcher is not None:
            self.launcher = RayLauncher(**options.ray)
            self.launcher.check(self.config.subcommand, options.trainer)
        last = options.get("ckpt_path") == "last"
        if last:
            options["ckpt_path"] = last_checkpoint(options.trainer)
        path = options.get("ckpt_path")
        for entry in _loggers(options.trainer.logger) if options else []:
            name = entry.class_path.removeprefix("lightning.pytorch.loggers.")
            if name == "WandbLogger" or (name == "CSVLogger" and self.config.subcommand == "fit"):
                entry.class_path = f"miepo.training.loggers.{name}"
        if "weights_only" in options:
            options["weights_only"] = True  # a checkpoint is data: nothing in it is executed
        if options and path is None:
            if last and self.config.subcommand == "fit":  # so that a job's script may always ask for it
                rank_zero_info("No run to continue yet: a new one begins")
            elif last:
                raise UserError("--ckpt_path last: expected a run with a checkpoint, got none")
            elif self.config.subcommand == "predict":
                raise UserError("predict answers with a trained policy: expected --ckpt_path, got none")
            elif self.config.subcommand in ("validate", "test"):
                rank_zero_warn("without --ckpt_path the untrained policy is evaluated")
        elif path == "best":
            raise UserError(
                "--ckpt_path takes last or a checkpoint's file, got best: which trade-off is best no run can say"
            )
        elif path == "hpc":
            root = options.trainer.default_root_dir or "."
            if not list(Path(root).glob("hpc_ckpt_*.ckpt")):
                raise UserError(f"--ckpt_path hpc: expected what Lightning writes when SLURM ends a job in '{root}'")
        elif path is not None:
            if is_file(inside := Path(path) / "checkpoints" / "last.ckpt"):  # the folder of a run
                path = options["ckpt_path"] = str(inside)
            if not is_file(Path(path)):
                raise UserError(f"expected a checkpoint at '{path}': there is none")
            saved = read_checkpoint(Path(path), "meta", resume=self.config.subcommand == "fit")
            if last and self.config.subcommand == "fit":
                self.continues = True
                continue_logs(options.trainer.logger, loggers_of(saved))
        if self.worker is not None:
            continue_logs(options.trainer.logger, self.worker.versions, self.worker.continues)

    def _run_subcommand(self, subcommand: str) -> None:
        type(self).began = True
        if isinstance(self.model, PolicyModule):  # before objectives load their models
            self.model.check_trainer(self.trainer, subcommand)
            try:
                base_folder(self.model.policy.base)
            except NoBase as error:
                raise NoBase(f"policy.base: {error}") from None
        if subcommand == "fit" and not self.config.fit.ckpt_path and self.worker is None:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunCheckpoint):
                    callback.expect_no_run(self.trainer)
        if self.launcher is not None:
            self.launcher.launch(self.words, self.trainer, self.model, self.datamodule, self.config.fit, self.continues)
        else:
            super()._run_subcommand(subcommand)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if config.get("enable_progress_bar") is None and not sys.stderr.isatty():
            config["enable_progress_bar"] = False  # ProgressLog writes lines
        configured = config.get("callbacks") or []
        own = [type(callback) for callback in (configured if isinstance(configured, list) else [configured])]
        callbacks = [c for c in callbacks if type(c) not in own]  # what the trainer's callbacks name counts
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        if config.get("fast_dev_run"):
            callbacks = [c for c in callbacks if not isinstance(c, EvaluationRecord)]
        if self.launcher is not None:
            config |= UNUSED_DEVICES
        if self.worker is not None:
            config |= self.worker.trainer_settings(self.config.fit.trainer.strategy, config.get("plugins"))
        trainer = super()._instantiate_trainer(config, callbacks)
        if self.worker is not None:
            self.worker.prepare(trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.words = args
        super().parse_arguments(parser, with_nulls(args) if isinstance(args, list) else args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend(self._get(self.config_init, "objectives") or [])  # type: ignore[attr-defined]
        return trainer


def _data_seed(seed: bool | int | None) -> int:
    return 0 if seed is None or isinstance(seed, bool) else seed


class _Parsers(MiepoCLI):
    """Has the parsers of all commands and builds nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        raise _Made(self._subcommand_parsers)


class _Made(Exception):
    """Carries what is wanted out of a constructor that would go on."""


def command_parsers() -> dict[str, LightningArgumentParser]:
    """Return the parsers of ``fit``, ``validate``, ``test`` and ``predict``."""
    try:
        _Parsers(seed_everything_default=0, parser_kwargs={"prog": "miepo"})
    except _Made as made:
        return made.args[0]
    raise AssertionError("expected LightningCLI to parse")


def train(args: ArgsType, worker: RayWorker | None = None) -> None:
    """Run ``miepo fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: The words of the command.
        worker: What is otherwise on a worker of Ray, where this is one.
    """
    run_cli(save_config_callback=LogConfig, save_config_kwargs={"overwrite": True}, args=args, worker=worker)


def with_nulls(args: Sequence[str]) -> list[str]:
    """Write ``--model.policy.init_args.NAME null``, and its like, as a configuration, which may say so.

    On the command line jsonargparse reads the text None for a setting of a class within a class.

    >>> with_nulls(["fit", "--data.grid", "null", "--model.policy.lora_layers=null"])
    ['fit', '--data.grid', 'null', '--config', '{"model": {"policy": {"init_args": {"lora_layers": null}}}}']
    """
    found, rest = [], list(args)
    while rest:
        key, equals, value = (word := rest.pop(0)).partition("=")
        names = [name for name in key.removeprefix("--").split(".") if name != "init_args"]
        within = len(names) == 3 and names[0] in ("model", "data")  # setting, class, its setting
        if within and (value if equals else next(iter(rest), "")) == "null":
            if not equals:
                rest.pop(0)
            outer, inner, name = names
            found += ["--config", json.dumps({outer: {inner: {"init_args": {name: None}}}})]
        else:
            found.append(word)
    return found


def run_cli(**kwargs: Any) -> MiepoCLI:
    """Build what a configuration says, and run the command where there is one.

    Raises:
        UserError: it cannot be built.
    """
    quiet()
    MiepoCLI.began = False
    try:
        return MiepoCLI(seed_everything_default=0, parser_kwargs={"prog": "miepo"}, **kwargs)
    except Exception as error:
        if MiepoCLI.began or user_error(error) or outer_mistake(error):
            raise
        raise UserError(f"expected a configuration that can be built, got {construction_error(error)}") from error
