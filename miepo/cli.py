"""``miepo fit | validate | test | predict | normalise --config ..``: LightningCLI with objectives, and
errors in one sentence."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from miepo.callbacks import EvaluationRecord, ProgressLog, ResponseWriter, RunCheckpoint
from miepo.callbacks.reporting import run_folder
from miepo.callbacks.run_checkpoint import loggers_of
from miepo.checkpoints import read_checkpoint
from miepo.datamodule import OnlinePreferenceDataModule
from miepo.errors import UserError, first_line
from miepo.module import MIEPO
from miepo.normalisation import calibrate, write_normalisation
from miepo.objectives import Objective
from miepo.objectives.base import objectives_of
from miepo.policy.base_model import base_folder
from miepo.policy_module import PolicyModule
from miepo.resources import check_writable, is_file

DESCRIPTION = (
    "Train and use a policy for every trade-off between objectives. Beside the subcommands below: miepo normalise "
    "measures the normalisation of rewards on offline data; miepo report writes a page about runs; miepo steer shows a "
    "trained policy on a local page, miepo serve answers OpenAI's chat requests with it, miepo export writes it as a "
    "PEFT adapter or a whole model."
)


# loaded when they are asked for
COMMANDS = {
    "export": "miepo.export",
    "report": "miepo.report.command",
    "serve": "miepo.serving.command",
    "steer": "miepo.steer",
}


class LogConfig(SaveConfigCallback):
    """Saves the configuration with the run and gives all of it to the loggers."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.save_to_log_dir = trainer.log_dir is not None  # a logger may have no folder of its own
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        own = {key: value for key, value in config.items() if key not in ("ckpt_path", "weights_only")}
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
    """

    began = False  # whether everything was built: what goes wrong before is the configuration's

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            PolicyModule,
            LightningDataModule,
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
        parser.add_lightning_class_args(ResponseWriter, "writer")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EvaluationRecord, "record")
        parser.add_lightning_class_args(ProgressLog, "progress")
        parser.set_defaults({"trainer.enable_model_summary": False})  # PolicyModule says what trains
        defaults = {"model": MIEPO, "data": OnlinePreferenceDataModule}
        parser.set_defaults({key: {"class_path": f"miepo.{value.__name__}"} for key, value in defaults.items()})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_data_seed)

    def _parse_ckpt_path(self) -> None:
        """Finds and checks the checkpoint before anything is built; nothing in it changes the configuration.

        ``last`` is the newest run's, which ``fit`` continues where it logs.
        """
        options: Any = self.config[self.config.subcommand] if self.config.get("subcommand") else {}
        last = options.get("ckpt_path") == "last"
        if last:
            options["ckpt_path"] = last_checkpoint(options.trainer)
        path = options.get("ckpt_path")
        for entry in _loggers(options.trainer.logger) if options else []:
            name = entry.class_path.removeprefix("lightning.pytorch.loggers.")
            if name == "WandbLogger" or (name == "CSVLogger" and self.config.subcommand == "fit"):
                entry.class_path = f"miepo.loggers.{name}"
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
                continue_logs(options.trainer.logger, loggers_of(saved))

    def _run_subcommand(self, subcommand: str) -> None:
        type(self).began = True
        if isinstance(self.model, PolicyModule):  # before objectives load their models
            self.model.check_trainer(self.trainer, subcommand)
            base_folder(self.model.policy.base)
        if subcommand == "fit" and not self.config.fit.ckpt_path:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunCheckpoint):
                    callback.expect_no_run(self.trainer)
        super()._run_subcommand(subcommand)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if config.get("enable_progress_bar") is None and not sys.stderr.isatty():
            config["enable_progress_bar"] = False  # ProgressLog writes lines
        given = config.get("callbacks") or []
        own = [c for c in (given if isinstance(given, list) else [given]) if isinstance(c, RunCheckpoint)]
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run") or own:
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        if config.get("fast_dev_run"):
            callbacks = [c for c in callbacks if not isinstance(c, EvaluationRecord)]
        return super()._instantiate_trainer(config, callbacks)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend(self._get(self.config_init, "objectives") or [])  # type: ignore[attr-defined]
        return trainer


def last_checkpoint(trainer: Any) -> str | None:
    """The newest ``checkpoints/last.ckpt`` among the runs where this configuration's first logger has its own."""
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


def continue_logs(loggers: Any, versions: Sequence[dict[str, Any]]) -> None:
    """Sets the loggers of a configuration to go on where those of a run, by class and version, were."""
    left = list(versions)
    for entry in _loggers(loggers):
        kind = entry.class_path.rpartition(".")[2]
        found = next((v for v in left if v["class"] == kind), None)
        if found is None:
            continue
        left.remove(found)  # of two loggers of one class each has its own
        version = found["version"]
        entry.init_args = entry.get("init_args") or Namespace()
        if kind == "WandbLogger":
            entry.init_args["id"], entry.init_args["resume"] = version, "allow"
        else:
            entry.init_args["version"] = version
        if kind == "CSVLogger":
            entry.init_args["resume"] = True


def _loggers(entries: Any) -> list[Any]:
    return [e for e in (entries if isinstance(entries, list) else [entries]) if hasattr(e, "class_path")]


def normalise(args: Sequence[str]) -> None:
    """``miepo normalise --config .. --out FILE``: measures the normalisation on offline data, and writes it."""
    parser = ArgumentParser(
        prog="miepo normalise",
        description="Measures mean and standard deviation of every objective on offline data. All other options are "
        "those of a run: --config online.yaml, and changes to it.",
    )
    parser.add_argument("--out", type=Path, help="the file to write; data.normalisation of a run takes it")
    options, rest = parser.parse_known_args(args)
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    if options.out is None:
        raise UserError("normalise writes a file: expected --out, got none")
    if options.out.exists():
        raise UserError(f"expected a new file for the normalisation, got '{options.out}', which exists")
    check_writable(options.out)
    cli = MiepoCLI(run=False, save_config_callback=None, args=rest, seed_everything_default=0)
    objectives = objectives_of(cli.trainer)
    if not isinstance(cli.datamodule, OnlinePreferenceDataModule):
        raise UserError(f"normalise needs data OnlinePreferenceDataModule, got {type(cli.datamodule).__name__}")
    offline = cli.datamodule.offline_responses()
    if offline is None:
        raise UserError("normalise measures on offline data: expected data.normalise_on offline or a file")
    missing = [o for o in objectives if o.normalisation is None]
    if not missing:
        raise UserError("normalise measures what has no normalisation in the config: every objective has one")
    for objective in missing:
        objective.load_checked(cli.trainer.strategy.root_device)
        calibrate([objective], offline)
        objective.unload()  # one model at a time
        assert objective.normalisation is not None
        print(f"{objective.name}: mean {objective.normalisation.mean:.4g}, sd {objective.normalisation.sd:.4g}")
    write_normalisation(options.out, missing, offline)
    print(f"Normalisation on {len(offline.responses)} responses of {offline.source}: {options.out}")


def _data_seed(seed: bool | int | None) -> int:
    return 0 if seed is None or isinstance(seed, bool) else seed


def main(args: ArgsType = None) -> None:
    """The command. A user's mistake ends in one sentence and exit status 2; ``MIEPO_TRACEBACK=1`` shows where."""
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the user's own objectives, beside the configuration
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # prompts are in memory
    warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # whole batches; no one asks which rows
    quiet()
    given = sys.argv[1:] if args is None else args
    MiepoCLI.began = False
    command = given[0] if isinstance(given, list) and given else None
    try:
        if isinstance(given, list):
            check_yaml(given)
        if isinstance(given, list) and given[:1] == ["normalise"]:
            normalise(given[1:])
            return
        if isinstance(given, list) and command in COMMANDS:
            import_module(COMMANDS[command]).main(given[1:])
            return
        MiepoCLI(
            save_config_callback=LogConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"description": DESCRIPTION},
            args=args,
        )
    except Exception as error:
        mistake: object = user_error(error) or outer_mistake(error)
        if mistake is None and not MiepoCLI.began and command not in COMMANDS:
            mistake = f"expected a configuration that can be built, got {type(error).__name__}: {first_line(error)}"
        if mistake is None or os.environ.get("MIEPO_TRACEBACK"):
            raise
        print(f"miepo: error: {mistake}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """Keeps other libraries' deprecations, advertisements and bars of converters out of the output."""
    for message in (".*`is_gradient_checkpointing` is deprecated.*", ".*LeafSpec.*"):  # peft, lightning
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(f, _Unasked) for f in lightning_log.filters):
        lightning_log.addFilter(_Unasked())


class _Unasked(logging.Filter):
    """Drops what Lightning says of products and of devices that nobody asked for."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage() and not record.getMessage().startswith("TPU available")


def check_yaml(args: Sequence[str]) -> None:
    """Refuses a configuration file in which something contains itself, or in which a key stands twice.

    Whoever walks through the one does not come back; of the other the parser would drop the first without a word.
    """
    files = [b for a, b in pairwise(args) if a == "--config"]
    files += [a.removeprefix("--config=") for a in args if a.startswith("--config=")]
    for file in files:
        if not is_file(Path(file)):  # a pipe can be read once, by the parser
            continue
        try:
            root = yaml.compose(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue  # the parser says what it is
        open_nodes: set[int] = set()
        closed: set[int] = set()  # what is referred to many times is looked at once
        walk = [(root, False)]
        while walk:
            node, left = walk.pop()
            if left:
                open_nodes.discard(id(node))
                closed.add(id(node))
            elif id(node) in open_nodes:
                raise UserError(f"expected a configuration in '{file}', got one in which something contains itself")
            elif isinstance(node, yaml.CollectionNode) and id(node) not in closed:
                open_nodes.add(id(node))
                if isinstance(node, yaml.MappingNode):
                    _refuse_repeated(node, file)
                inside = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
                walk += [(node, True), *((n, False) for n in inside)]


def _refuse_repeated(node: yaml.MappingNode, file: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (first := lines.setdefault(key.value, line)) != line:
            raise UserError(f"'{file}' has the key '{key.value}' in lines {first} and {line}: expected it once")


def user_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an exception: the parser wraps what a constructor raises in errors of its own."""
    while error is not None and not isinstance(error, (UserError, MisconfigurationException)):
        error = error.__cause__ or error.__context__
    return error


def outer_mistake(error: BaseException) -> str | None:
    """What is to be said of an error that the machine or a library gives a reason for, which the user can mend."""
    if isinstance(error, OSError) and error.strerror:
        path = f", got '{error.filename}'" if error.filename else ""
        return f"expected paths that can be read and written{path}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device's memory is spent: expected smaller batches (data.batch_size, data.evaluation_batch_size), "
            "shorter responses or a smaller policy.tokens_per_pass; python -m tools.memory tells beforehand"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return f"trainer.callbacks EarlyStopping: {first_line(error)}"
    return None


if __name__ == "__main__":
    main()
