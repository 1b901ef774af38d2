"""The mutual information that MI-EPO is about, measured while it trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from miepo.callbacks.reporting import gathered_rows, grid_of, log_evaluation, whole_evaluation
from miepo.metrics import PreferenceInformationMetric, t_interval
from miepo.policy import Policy
from miepo.types import EvaluationBatch, Tokens

METRIC = "preference_information"


def grid_log_prob(policy: Policy, batch: EvaluationBatch, grid: Tensor) -> Tensor:
    """Log-probability of each response under every preference vector of a grid, ``(N, M)``.

    A prompt is read once under each vector, for all its responses in the batch.
    """
    rows: dict[int, list[int]] = {}  # of each prompt
    for row, position in enumerate(batch.positions):
        rows.setdefault(position, []).append(row)
    index = pad_sequence([torch.tensor(group) for group in rows.values()], batch_first=True, padding_value=-1)  # (B, n)
    index = index.to(batch.responses.tokens.ids.device)
    tokens = batch.responses.tokens.flat()  # (N, T)
    wanted = (index >= 0).unsqueeze(-1).expand(-1, -1, len(grid))  # (B, n, M)
    found = policy.response_log_prob(
        [batch.prompts[group[0]] for group in rows.values()],
        grid.expand(len(rows), -1, -1),
        Tokens(tokens.ids[index], tokens.mask[index]),
        wanted,
    ).sum(-1)  # (B, n, M)
    log_prob = torch.empty(len(batch), len(grid), device=found.device)
    return log_prob.index_put((index[index >= 0],), found[index >= 0])


class PreferenceInformation(Callback):
    """I(Y; W | X) over the evaluation grid and, for each objective, the information of its feedback; in nats.

    At every evaluation it logs ``information/preference`` with its 95 % t interval over prompts (``.._low``,
    ``.._high``) and ``information/ceiling``, which is ``log M``. It costs M passes over the evaluation responses. From
    the training pairs since the last evaluation it logs ``information/feedback/NAME`` with its t interval: a lower
    bound of I(Y; C_k | X, W), see :func:`~miepo.metrics.feedback_information`.
    """

    def __init__(self) -> None:
        self.pairs: list[Tensor] = []  # (B, K) each
        self.trainer: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The pairs since the last evaluation, of all processes."""
        pairs = gathered_rows(self.trainer, self.pairs)
        return {"pairs": torch.cat(pairs) if pairs else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pairs = state_dict["pairs"]
        self.pairs = [] if pairs is None or not self.trainer.is_global_zero else [pairs]

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.trainer = trainer
        if stage != "predict":
            grid = grid_of(trainer, self)
            pl_module.metrics[METRIC] = PreferenceInformationMetric(len(grid))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "feedback_information" in outputs:  # methods that judge pairs
            self.pairs.append(outputs["feedback_information"].cpu())

    @whole_evaluation
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: EvaluationBatch, *_: Any
    ) -> None:
        grid = trainer.datamodule.grid  # type: ignore[attr-defined]
        policy: Policy = pl_module.policy
        with policy.evaluating():
            log_prob = grid_log_prob(policy, batch, grid)  # (N, M)
        pl_module.metrics[METRIC].update(log_prob, batch.grid_index, torch.tensor(batch.positions))

    @whole_evaluation
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        metric = pl_module.metrics[METRIC]
        values = {f"information/{key}": value.float() for key, value in metric.compute().items()}
        metric.reset()
        pairs = gathered_rows(trainer, self.pairs)
        if pairs:
            # in an order that does not tell which process had which
            each = torch.cat(pairs).sort(0).values  # (n, K)
            for suffix, figures in zip(("", "_low", "_high"), t_interval(each), strict=True):
                values |= zip(
                    (f"information/feedback/{n}{suffix}" for n in pl_module.names), figures.float(), strict=True
                )
            self.pairs = []
        log_evaluation(trainer, pl_module, {k: v for k, v in values.items() if not v.isnan()})

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
