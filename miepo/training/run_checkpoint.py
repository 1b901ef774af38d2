"""The checkpoint a run goes on from, and what happens when it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from miepo.errors import UserError
from miepo.recorded import Recorded
from miepo.training.lightning_internals import accumulates, count_steps_as_logged, forget_restart
from miepo.training.loggers import CSVLogger
from miepo.training.reporting import log_versions, run_folder

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; the end of a job; what SLURM sends before it, if it is asked to


class Interrupted(SystemExit):
    """The process was asked to stop, and did so with a checkpoint; its exit status is 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class RunCheckpoint(Recorded, Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, from which the run goes on as if it had not stopped.

    It is written between two steps: the update is done, its figures are with the loggers, an evaluation that was due
    is over. ``miepo fit --ckpt_path last`` finds it.

    SIGTERM, SIGUSR1 and Ctrl-C end the run at the next such moment, with a checkpoint; a run of one process during an
    evaluation, too, at its next batch, to go on with the whole evaluation. A second Ctrl-C stops at once, without one.

    Args:
        every_n_steps: Optimiser steps between two checkpoints. The end of training writes one in any case.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        if not every_n_steps or every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.last_model_path = ""
        self.after_save: Callable[[Trainer, Path], None] | None = None  # of a launcher, on every process
        self._saved_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._evaluating = self._evaluation_due = self._resumed = self._limits_changed = False
        self._loggers: list[dict[str, Any]] = []
        self._rows_per_batch: int | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._listen()
            self.path = Path(trainer.strategy.broadcast(str(_last(trainer))))

    def expect_no_run(self, trainer: Trainer) -> None:
        """Refuse to begin a run in the folder of another: without a logger, no run has a folder to itself.

        Raises:
            UserError: there is a checkpoint.
        """
        if (path := _last(trainer)).exists():
            raise UserError(
                f"expected a folder without a run, got '{path.parents[1]}', which has checkpoints/last.ckpt: "
                "go on with it (--ckpt_path last) or name another (--trainer.default_root_dir, the logger's version)"
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluation_due": self._evaluating,
            "loggers": self._loggers,
            "rows_per_batch": self._rows_per_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._evaluation_due, self._resumed = bool(state_dict.get("evaluation_due")), True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._limits_changed = _config_in(checkpoint).get("trainer") != pl_module.configuration().get("trainer")
        if trainer.state.fn == "fit":
            before, now = _rows_before(checkpoint, trainer), _rows_per_batch(trainer)
            pl_module.look_at_data()
            if before and now:
                _regroup(checkpoint, before, now, trainer.accumulate_grad_batches, trainer.num_training_batches)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]  # between two steps Lightning has already looked at the next batch
        batches["is_last_batch"] = batches["current"]["ready"] >= trainer.num_training_batches
        epochs = loops["epoch_progress"]
        closed = epochs["current"]["ready"] == epochs["current"]["processed"]
        if closed and not batches["is_last_batch"]:  # the run ends within an epoch: with more steps it goes on there
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] -= 1
                counts["completed"] = counts["processed"]
        if self._evaluating:  # what of it is done is in no checkpoint: it is repeated as a whole
            progress = loops["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, 0))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._loggers, self._rows_per_batch = log_versions(trainer), _rows_per_batch(trainer)
        self._saved_step = trainer.global_step
        self._listen()
        if self._resumed:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.forget_from(trainer.global_step)
            epoch = trainer.fit_loop.epoch_progress.current
            if epoch.ready == epoch.completed:  # between two epochs; Lightning would begin one without batches
                forget_restart(trainer)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            if not self._limits_changed and any(map(_has_stopped, callbacks)):
                rank_zero_info("The run was ended by EarlyStopping: it goes on where the trainer's settings change")
                trainer.should_stop = True
        if self._evaluation_due:
            self._evaluation_due = False
            loop = trainer.fit_loop.epoch_loop
            trainer.validating = True
            loop.val_loop.restarting = False
            loop.val_loop.run()
            trainer.training = True

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._evaluation_due:  # all steps were done, and Lightning has nothing to begin
            self.on_train_start(trainer, pl_module)
            trainer.fit_loop.on_advance_end()
            trainer.fit_loop.on_run_end()
        if self.last_model_path:
            rank_zero_info(f"Checkpoint: {self.last_model_path}")

    # -- moments -------------------------------------------------------------------------------------------------------

    def between_steps(self, trainer: Trainer) -> None:
        """Save or stop where either is due: the next step is about to begin, and nothing of it has."""
        if self._resumed:
            count_steps_as_logged(trainer)
            self._resumed = False
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches:
            return  # gradients wait for more, and are in no checkpoint
        stepped, stopping = trainer.global_step > self._saved_step, self._asked(trainer)
        if stepped and (stopping or trainer.global_step % self.every_n_steps == 0):
            self.save(trainer)
        if stopping:
            self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._evaluating = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._leave()  # Lightning puts its own handlers in front now, and would put ours back when it ends

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._listen()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit" or self._signal is None:
            return
        # the shares of several processes may be uneven, so that they cannot agree here; and gradients that wait for
        # more are in no checkpoint
        if trainer.world_size > 1 or (self._evaluating and accumulates(trainer)):
            return
        if self._evaluating:
            self.save(trainer)
        self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._evaluating = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # an epoch of which nothing was left but its evaluation has no step in which Lightning would note that the
        # restart is over, and no next epoch would begin
        trainer.fit_loop.epoch_loop.restarting = False

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step > self._saved_step or not self.last_model_path:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint; what was logged before it is on the disk by then."""
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path, weights_only=False)  # optimiser and places, too
        self._saved_step, self.last_model_path = trainer.global_step, str(self.path)
        if self.after_save is not None:
            self.after_save(trainer, self.path)

    # -- signals -------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # no one else may
        for name in SIGNALS:
            if (number := getattr(signal, name, None)) is not None:
                self._handlers.setdefault(number, signal.signal(number, self._note))

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        rank_zero_info(f"\n{signal.Signals(number).name}: this step is finished and kept, then the run stops")

    def _asked(self, trainer: Trainer) -> bool:
        """Return whether any process was asked to stop; all of them learn it at the same moment."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _stop(self, trainer: Trainer) -> None:
        number = self._signal or signal.SIGTERM  # another process was asked
        outcome = f"checkpoint: {self.last_model_path}" if self.last_model_path else "no step was finished"
        rank_zero_info(f"Stopped by {signal.Signals(number).name} after {trainer.global_step} steps; {outcome}")
        raise Interrupted(number)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _has_stopped(callback: Any) -> bool:
    return isinstance(callback, EarlyStopping) and callback.wait_count >= callback.patience


def _rows_per_batch(trainer: Any) -> int | None:
    """Return prompts or examples in a batch of all processes; None where the data module does not say."""
    size = getattr(trainer.datamodule, "batch_size", None)
    return None if size is None else size * trainer.world_size


def _rows_before(checkpoint: Mapping[str, Any], trainer: Any) -> int | None:
    """Return the same, of the run that wrote a checkpoint.

    An older one tells its batch, and not of how many processes.
    """
    rows_per_batch = _state_in(checkpoint).get("rows_per_batch")
    size = ((_config_in(checkpoint).get("data") or {}).get("init_args") or {}).get("batch_size")
    of_processes = size * trainer.world_size if isinstance(size, int) else None
    return rows_per_batch if isinstance(rows_per_batch, int) and rows_per_batch > 0 else of_processes


def _regroup(checkpoint: Mapping[str, Any], before: int, now: int, accumulated: int, limit: float) -> None:
    """Count what an epoch has done in batches of the size they have now, so that it goes on at the row it reached.

    What does not fill a batch, or a step of ``accumulated`` batches, is done again; and where it has no batch left up
    to the ``limit``, its last, after which it ends as epochs do.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]
    current, total = batches["current"], batches["total"]
    rows = current["processed"] * before
    done = int(min(rows // now, limit - 1)) // accumulated * accumulated
    within = epochs["ready"] > epochs["processed"] and not batches["is_last_batch"]
    if not within or (done, now) == (current["processed"], before):
        return
    batches["current"] = dict.fromkeys(current, done)
    batches["total"] = dict.fromkeys(total, total["processed"])  # or Lightning would add what it counts later
    rank_zero_info(
        f"Batches or steps have another size: the epoch goes on after {done * now} rows, "
        f"{max(rows - done * now, 0)} of {rows} are taken again"
    )


def begin_step(trainer: Any) -> None:
    """Let the run's checkpoint act between two steps: a batch was fetched, and all of the last step is done."""
    if trainer.training:
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.between_steps(trainer)


def loggers_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return class and version of the loggers of the run that wrote a checkpoint."""
    return _state_in(checkpoint).get("loggers", [])


def _config_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return (checkpoint.get("miepo") or {}).get("config") or {}


def _state_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    states = [v for k, v in checkpoint.get("callbacks", {}).items() if k.startswith(RunCheckpoint.__name__)]
    return states[0] if states else {}


def _last(trainer: Trainer) -> Path:
    return run_folder(trainer) / "checkpoints" / "last.ckpt"
