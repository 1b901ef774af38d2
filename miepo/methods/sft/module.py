"""The module of supervised fine-tuning; the merged model that it saves is the base of the online stage."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from miepo.errors import UserError
from miepo.losses import supervised_loss
from miepo.methods.base import PolicyModule
from miepo.methods.sft.data import SupervisedDataModule
from miepo.policy import Policy
from miepo.policy.policy import rounding_note
from miepo.resources import check_writable
from miepo.training.distributed import over_processes
from miepo.training.reporting import run_folder
from miepo.training.sharded_strategy import ShardedStrategy
from miepo.types import SupervisedBatch


class SupervisedFineTuning(PolicyModule):
    """Response-only cross-entropy on given responses, with LoRA.

    When training has ended, the adapter is merged into the base and saved as a complete Hugging Face folder.

    Args:
        policy: A policy without conditioning (``conditioning: []``).
        learning_rate: Peak rate of Adam (paper: 1e-6 for safe alignment, 2e-5 for the helpful assistant).
        warmup: Fraction of all steps in which the rate rises (paper: 0.1).
        save_to: Folder of the merged model; by default ``merged`` in the run's folder.
    """

    conditioned = False

    def __init__(
        self, policy: Policy, learning_rate: float = 2e-5, warmup: float = 0.1, save_to: str | None = None
    ) -> None:
        super().__init__(policy, learning_rate, warmup)
        self.save_to = save_to
        if policy.conditioning:
            got = ", ".join(type(c).__name__ for c in policy.conditioning)
            raise UserError(f"SupervisedFineTuning needs a policy without conditioning (conditioning: []), got {got}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(self.trainer.strategy, ShardedStrategy):
            raise UserError("SupervisedFineTuning merges whole weights: expected trainer.strategy ddp, got sharded")
        if not isinstance(data, SupervisedDataModule):
            raise UserError(f"SupervisedFineTuning needs data SupervisedDataModule, got {type(data).__name__}")
        if stage == "fit":
            self.folder = Path(self.save_to) if self.save_to else run_folder(self.trainer) / "merged"
            self.steps_before: int | None = None

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.trainer.ckpt_path:
            self._check_folder()
        check_writable(self.folder)

    def _check_folder(self) -> None:
        if self._is_written():
            raise UserError(f"expected an empty folder for the merged model, got '{self.folder}': set model.save_to")

    def _is_written(self) -> bool:
        return self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))

    def on_train_start(self) -> None:
        super().on_train_start()
        self.steps_before = self.trainer.global_step
        if self.save_to:  # of a run that goes on where it had ended; in the run's own folder it is replaced
            self._check_folder()

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> STEP_OUTPUT:
        log_prob, mask = self._log_prob(batch), batch.responses.mask  # (N, T)
        means, _ = over_processes(self.trainer.strategy, {"loss": -log_prob.detach()[mask]}, {})  # over tokens
        self.log("loss", means["loss"], prog_bar=True, batch_size=len(batch))
        # by what a batch has on average and not by what this one has: batches are of like length, and each token of a
        # step counts the same
        return {"loss": supervised_loss(log_prob, mask, self.trainer.datamodule.tokens_per_batch)}  # type: ignore[attr-defined]

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:  # type: ignore[override]
        with self.policy.evaluating():
            loss = supervised_loss(self._log_prob(batch), batch.responses.mask)
        tokens = int(batch.responses.mask.sum())  # so that the mean over batches is that over tokens
        self.log("validation/loss", loss, prog_bar=True, batch_size=tokens, sync_dist=True)

    test_step = validation_step  # type: ignore[assignment]

    def _log_prob(self, batch: SupervisedBatch) -> Tensor:
        prompts = self.policy.encode_text(batch.prompts, [""] * len(batch))  # (N, P)
        return self.policy.log_prob(prompts, batch.scores, batch.responses)  # (N, T)

    def on_fit_end(self) -> None:
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        if self._is_written():
            if self.steps_before in (None, self.trainer.global_step):
                rank_zero_info(f"Merged model, as it was: {self.folder}")
                return
            if not self.save_to:  # the run's own: of a run that had ended and was given more steps
                shutil.rmtree(self.folder)
        self.policy.causal_lm.generation_config = self.policy.generation_config  # of the base, for whoever samples
        remaining = self.policy.save_merged(self.folder)
        rank_zero_info(f"Merged model: {self.folder}")
        if note := rounding_note(remaining):
            rank_zero_warn(
                f"{note}, so that the merged model is not quite the one that was trained: policy.dtype float32 keeps "
                "all of it, a higher learning rate more"
            )
