"""What the module of every method has in common: the policy, its optimiser, evaluation steps, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import inf
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_cosine_schedule_with_warmup

from miepo.data.rollout import Learner
from miepo.errors import UserError, first_line, invalid
from miepo.evaluation import Evaluation, evaluations_in
from miepo.objectives import Objective
from miepo.objectives.base import objectives_of, take_failures
from miepo.policy import Policy
from miepo.recorded import Recorded, import_path, specification, without_prompts
from miepo.renamed import current_settings
from miepo.seeding import RandomStream, torch_seed
from miepo.training.checkpoint_io import DurableCheckpointIO, check_adapter, check_base, config_changes
from miepo.training.distributed import over_processes
from miepo.training.progress import place_in_steps
from miepo.training.reporting import log_evaluation, run_folder, whole_evaluation
from miepo.training.run_checkpoint import begin_step
from miepo.training.sharded_strategy import ShardedStrategy
from miepo.types import EvaluationBatch, PreferenceBatch

SPLITTING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
# callbacks with which a run could not go on as if it had not stopped, and those that average no adapter
REFUSED = (BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder)
AVERAGING = (StochasticWeightAveraging, WeightAveraging)
SCHEMA = 2  # 2: the configuration, and what RunCheckpoint keeps


class PolicyModule(Recorded, LightningModule):
    """A preference-conditioned policy in training; a method adds its ``training_step``.

    It may log by :meth:`log_step`, and say by :attr:`learner` what its rollouts need.

    Args:
        policy: The preference-conditioned policy.
        learning_rate: Peak rate of Adam.
        warmup: Fraction of all steps in which the rate rises.
    """

    conditioned = True  # on preferences between objectives

    def __init__(self, policy: Policy, learning_rate: float, warmup: float) -> None:
        super().__init__()
        if not 0 <= learning_rate < inf:
            raise UserError(f"learning_rate must be a number that is not negative, got {learning_rate}")
        if not 0 <= warmup < 1:
            raise UserError(f"warmup is a fraction of all steps, at least 0 and below 1, got {warmup}")
        self.policy = policy
        self.learning_rate, self.warmup = learning_rate, warmup
        self.objectives: list[Objective] = []
        self.evaluations: list[Evaluation] = []  # the first and the last of the run
        self.evaluation: Evaluation | None = None  # the newest, outside of training, too
        self.measured: dict[str, Tensor] = {}  # by callbacks, in the evaluation that is under way
        self.metrics = nn.ModuleDict()  # filled by callbacks, so that metrics move and reduce with the module
        self.strict_loading = False  # checkpoints hold the adapter only; on_load_checkpoint checks that it is whole
        self.config: dict[str, Any] = {}  # the command's, where there is one
        self.ahead = 0  # steps by which the run's place is ahead of those it took, where batches got another size

    @property
    def learner(self) -> Learner:
        """What a rollout needs to know of this method; by default every objective counts by its weight."""
        return Learner(self.policy, self.objectives)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives, in column order."""
        return tuple(o.name for o in self.objectives)

    def configuration(self) -> dict[str, Any]:
        """Return what the run is made of as a configuration: the command's own, or stated from the objects."""
        if self.config:
            return self.config
        trainer: Any = self.trainer
        data = trainer.datamodule
        arguments = without_prompts(data.built_with) if isinstance(data, Recorded) else {}  # none of a user's own
        limits = ("max_epochs", "max_steps", "limit_train_batches")
        others = [c for c in trainer.callbacks if isinstance(c, Recorded) and not isinstance(c, Objective)]
        callbacks = [specification(callback) for callback in others]
        return {
            "seed_everything": getattr(data, "seed", None),
            "trainer": {name: getattr(trainer, name) for name in limits} | {"callbacks": callbacks},
            "model": specification(self),
            "data": {
                "class_path": None if data is None else import_path(type(data)),
                "init_args": specification(arguments),
            },
            "objectives": [specification(objective) for objective in self.objectives],
        }

    def check_trainer(self, trainer: Any, stage: str) -> None:
        """Refuse a trainer under which no policy trains as it should; needs nothing that takes time to load."""
        strategy = trainer.strategy
        if isinstance(strategy, SPLITTING) and not isinstance(strategy, ShardedStrategy):
            raise UserError(
                "expected trainer.strategy ddp, or sharded for a base that does not fit one device, got "
                f"{type(strategy).__name__}"
            )
        if self.conditioned:
            objectives_of(trainer)
            if not self.policy.conditioning:
                raise UserError("a policy needs at least one conditioning, got none")
        if stage == "fit" and not (trainer.accumulate_grad_batches or 1) >= 1:
            raise UserError(
                f"expected trainer.accumulate_grad_batches of at least 1, got {trainer.accumulate_grad_batches}"
            )
        if stage == "fit" and trainer.overfit_batches:
            raise UserError("trainer.overfit_batches is not for online data: expected trainer.limit_train_batches")
        if refused := [type(c).__name__ for c in trainer.callbacks if isinstance(c, REFUSED)]:
            raise UserError(f"a run with {refused[0]} could not go on as if it had not stopped: expected none")
        if refused := [type(c).__name__ for c in trainer.callbacks if isinstance(c, AVERAGING)]:
            raise UserError(f"{refused[0]} averages whole networks and not an adapter: expected none")
        if trainer.precision != "32-true":
            raise UserError(
                "the policy sets its own precision (policy.dtype), so that sampling and training agree: "
                f"expected trainer.precision 32-true, got {trainer.precision}"
            )

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        # Lightning says so of every module with this hook beside a data module
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        self.check_trainer(trainer, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        if self.conditioned:
            self.objectives = objectives_of(trainer)
        if stage == "fit" and trainer.is_global_zero:
            run_folder(trainer).mkdir(parents=True, exist_ok=True)  # what is wrong with it shows before hours are spent

    def configure_model(self) -> None:
        self.policy.build(self.names, self.trainer.strategy.root_device)
        if isinstance(self.trainer.strategy, ShardedStrategy) and self.policy.shards is None:
            self.trainer.strategy.shard(self.policy)

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps that are done."""
        return (self.trainer.global_step + self.ahead) / max(self.trainer.estimated_stepping_batches, 1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write a checkpoint that is due, or stop where the run was asked to, before anything is done with a batch.

        A data module that has this hook, too, is called in place of it, and has to call it.
        """
        begin_step(self.trainer)
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by the place in the run, as everything else is drawn."""
        trainer = self.trainer
        seed = getattr(trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
        torch.manual_seed(torch_seed(RandomStream.DROPOUT, seed, trainer.current_epoch, batch_idx, trainer.global_rank))

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Do nothing: responses are sampled and scored when they come here, and callbacks measure them."""

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Do as :meth:`validation_step` does."""

    def on_validation_epoch_end(self) -> None:
        if counts := self.failures():
            log_evaluation(self.trainer, self, over_processes(self.trainer.strategy, {}, counts)[1])
        self.end_evaluation()

    on_test_epoch_end = on_validation_epoch_end

    def end_evaluation(self) -> None:
        """Make an :class:`~miepo.evaluation.Evaluation` of what callbacks have measured."""
        measured = {key: value.detach().cpu() for key, value in self.measured.items()}
        self.measured = {}
        trainer: Any = self.trainer
        if not self.conditioned or not hasattr(trainer.datamodule, "grid") or not whole_evaluation(trainer):
            return
        training = trainer.state.fn == "fit"
        self.evaluation = Evaluation(
            step=trainer.global_step if training else None,
            title=f"step {trainer.global_step}" if training else trainer.state.fn.value,
            names=self.names,
            grid=trainer.datamodule.grid.double().cpu(),
            figures={key: float(value) for key, value in measured.items() if not value.dim() and value.isfinite()},
            arrays={key: value.double() for key, value in measured.items() if value.dim()},
        )
        if training:
            self.evaluations = [*self.evaluations[:1], self.evaluation]

    def failures(self) -> dict[str, float]:
        """Return ``count/failed/NAME`` since they were last asked for."""
        return {f"count/{key}": float(value) for key, value in take_failures(self.objectives).items()}

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per answer: prompt, preference by objective name, response."""
        return [
            {"prompt": prompt, "preference": dict(zip(self.names, weights, strict=True)), "response": texts[0]}
            for prompt, weights, texts in zip(
                batch.prompts, batch.preference.double().round(decimals=6).tolist(), batch.responses.texts, strict=True
            )
        ]

    # -- optimisation and checkpoints ----------------------------------------------------------------------------------

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Return a linear warm-up and a cosine decay to 0 (Tables 3 and 4)."""
        return get_cosine_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)

    def configure_optimizers(self) -> Any:
        """Return Adam with :meth:`schedule`."""
        optimizer = torch.optim.Adam(self.policy.adapter_parameters().values(), lr=self.learning_rate)
        self.look_at_data()
        steps = self.trainer.estimated_stepping_batches
        if steps == inf:
            raise UserError(
                "the schedule needs the number of steps: expected trainer.max_epochs or max_steps, got none"
            )
        schedule = self.schedule(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def look_at_data(self) -> None:
        """Let Lightning count the batches of an epoch, where it has not."""
        try:
            self.trainer.fit_loop.setup_data()
        except ValueError as error:
            raise UserError(f"the trainer's settings do not fit the data: {first_line(error)}") from None

    def on_fit_start(self) -> None:
        """Say what trains, and keep with the run what it is made of."""
        trained = sum(p.numel() for p in self.policy.adapter_parameters().values())
        whole = sum(p.numel() for p in self.policy.parameters())
        rank_zero_info(f"{trained / 1e6:.3g} M parameters train, beside {(whole - trained) / 1e6:.3g} M of the base")
        if not self.config and self.trainer.is_global_zero:  # the command has written its own
            text = yaml.safe_dump(self.configuration(), sort_keys=False, allow_unicode=True)
            (run_folder(self.trainer) / "config.yaml").write_text(text, encoding="utf-8")

    def log_step(self, batch: PreferenceBatch, loss: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log a step of training: the loss, the responses and their rewards, and what a method adds.

        Returns:
            What is logged but counts, of all processes together.

        Args:
            batch: The rollout.
            loss: A scalar.
            values: Of any shape, by the name they are logged under: the mean over all processes of what is not NaN.
        """
        figures = {
            "loss": loss.detach(),
            "response/tokens": batch.responses.tokens.mask.sum(-1).float(),  # (B, n)
            "response/finished": batch.responses.finished.float(),
            **{f"reward/{name}": batch.scores[..., k] for k, name in enumerate(self.names)},
            **values,
        }
        counts = {f"count/{key}": float(value) for key, value in batch.counts.items()}
        size = len(batch)
        # NaN where no pair had a label: a value left out would be logged as it was the step before
        means, sums = over_processes(self.trainer.strategy, figures, counts)
        self.log("loss", means["loss"], prog_bar=True, batch_size=size)
        self.log_dict({name: value for name, value in means.items() if name != "loss"} | sums, batch_size=size)
        self.log("learning_rate", self.lr_schedulers().get_last_lr()[0], batch_size=size)  # type: ignore[union-attr]
        return means

    def on_train_start(self) -> None:
        """Take the learning rate and the place in its schedule from the configuration, not from the checkpoint."""
        place = place_in_steps(self.trainer)
        self.ahead = place - self.trainer.global_step
        for entry in self.trainer.lr_scheduler_configs:
            schedule = entry.scheduler
            if not isinstance(schedule, LambdaLR):
                continue
            schedule.last_epoch = place
            schedule.base_lrs = [self.learning_rate] * len(schedule.base_lrs)
            for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["initial_lr"] = self.learning_rate
                group["lr"] = self.learning_rate * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter and drop the base weights."""
        keep = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["miepo"] = {"schema": SCHEMA, "objectives": list(self.names), "base": self.policy.base}
        checkpoint["miepo"] |= {"policy": self.policy.settings(), "config": self.configuration()}
        checkpoint["miepo"]["policy_built_by"] = specification(self.policy)
        checkpoint["miepo"]["evaluations"] = [evaluation.state() for evaluation in self.evaluations]
        checkpoint["miepo"]["fingerprint"] = self.policy.fingerprint
        checkpoint["miepo"]["precision"] = str(self.policy.weight_dtype).removeprefix("torch.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other objectives or another adapter; restore the normalisation for evaluation."""
        saved = checkpoint.get("miepo")
        if saved is None:  # where Lightning's own trainer read it
            raise UserError("expected a checkpoint written by miepo, got one without its entry")
        if saved["schema"] > SCHEMA:
            raise UserError(f"expected a checkpoint of schema {SCHEMA} or older, got {saved['schema']}: update miepo")
        if saved["objectives"] != list(self.names):
            raise UserError(
                f"the checkpoint was trained on the objectives {saved['objectives']}, in this order; "
                f"the config lists {list(self.names)}"
            )
        now = self.policy.settings()
        if changed := config_changes(saved["policy"], now):
            both = "; ".join(f"{key} {before} and not {after}" for key, (before, after) in changed.items())
            raise UserError(f"the checkpoint's policy has {both}: set the configuration's policy alike")
        check_adapter({name: p for name, p in self.named_parameters() if p.requires_grad}, checkpoint["state_dict"])
        check_base(self.policy, saved["base"], saved.get("fingerprint"))
        if self.trainer.state.fn == "fit":
            try:
                self.evaluations = evaluations_in(saved, self.names, checkpoint.get("callbacks", {}))
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"the checkpoint's evaluations are malformed: {invalid(error)}") from None
        for objective in self.objectives:  # Lightning restores callbacks for fit alone
            objective.load_state_dict(checkpoint.get("callbacks", {}).get(objective.state_key, {}))
        precision = str(self.policy.weight_dtype).removeprefix("torch.")
        if saved.get("precision", precision) != precision:
            rank_zero_info(
                f"The checkpoint was trained in {saved['precision']}; the policy computes in {precision} here"
            )
        config = self.configuration() if self.trainer.state.fn == "fit" else {}
        if config and (saved.get("config") or {}).keys() == config.keys():  # of the command both, or of Python
            for key, (before, after) in sorted(config_changes(current_settings(saved["config"]), config).items()):
                rank_zero_info(f"{key}: {before} in the checkpoint, {after} now, which counts")
