"""The base class of callbacks that measure evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from miepo.recorded import Recorded
from miepo.training.reporting import grid_of, log_evaluation, whole_evaluation
from miepo.types import EvaluationBatch


class EvaluationCallback(Recorded, Callback):
    """Measures every evaluation: during training, before it where the sanity check covers the whole set, and outside.

    A subclass collects what it needs in :meth:`on_evaluation_batch` and returns its figures, by the name they are
    logged under, from :meth:`on_evaluation_end`. With several processes each sees its own batches:
    :func:`~miepo.training.distributed.gathered_rows` joins rows, and a torchmetrics metric that is put into
    ``module.metrics`` by :meth:`start` joins itself.
    """

    along_preferences = True  # whether it needs data that answer along preference vectors

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Call :meth:`start` with the preference vectors.

        Raises:
            UserError: the data have none.
        """
        if stage != "predict" and self.along_preferences:
            self.start(trainer, pl_module, grid_of(trainer, self))

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def start(self, trainer: Trainer, module: Any, grid: Tensor) -> None:
        """Prepare for evaluations under the preference vectors ``grid`` ``(M, K)``."""

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        """Take in some of the answers of an evaluation, with their scores."""

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> Mapping[str, Any] | None:
        """Return the figures of the evaluation by name: numbers are logged, what has dimensions is kept with them."""
        return None

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        """Act when all callbacks have returned their figures: ``module.evaluation`` has them."""

    # -- what Lightning calls ------------------------------------------------------------------------------------------

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any) -> None:
        if whole_evaluation(trainer):
            self.on_evaluation_batch(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if whole_evaluation(trainer) and (figures := self.on_evaluation_end(trainer, pl_module)):
            log_evaluation(trainer, pl_module, figures)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if whole_evaluation(trainer):
            self.after_evaluation(trainer, pl_module)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end
