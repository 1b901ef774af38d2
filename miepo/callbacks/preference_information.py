"""The mutual information that MI-EPO is about, measured while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.errors import UserError
from miepo.metrics import PreferenceInformationMetric, interval_figures, t_interval
from miepo.policy import Policy
from miepo.training.distributed import gathered_rows
from miepo.types import EvaluationBatch, Tokens

METRIC = "preference_information"


def read_by_prompt(
    batch: EvaluationBatch, read_mask: Tensor, read: Callable[[list[str], Tokens, Tensor], Tensor]
) -> Tensor:
    """Return the log-probability of each response under ``C`` preferences.

    A prompt is read once for all its responses in the batch.

    Args:
        batch: ``N`` responses, those to one prompt anywhere in it.
        read_mask: ``(N, C)`` True where a response is to be read under a preference.
        read: Of ``B`` prompts, responses ``(B, n, T)`` and what is wanted ``(B, n, C)``, to ``(B, n, C, T)``.

    Returns:
        ``(N, C)`` in nats, 0 where it is not wanted.
    """
    rows: dict[int, list[int]] = {}  # of each prompt
    for row, position in enumerate(batch.positions):
        rows.setdefault(position, []).append(row)
    index = pad_sequence([torch.tensor(group) for group in rows.values()], batch_first=True, padding_value=-1)  # (B, n)
    index = index.to(batch.responses.tokens.ids.device)
    tokens, read_mask = batch.responses.tokens.flat(), read_mask.to(index.device)
    found = read(
        [batch.prompts[group[0]] for group in rows.values()],
        Tokens(tokens.ids[index], tokens.mask[index]),
        read_mask[index] & (index >= 0).unsqueeze(-1),
    ).sum(-1)  # (B, n, C)
    log_prob = torch.empty(read_mask.shape, device=found.device)
    return log_prob.index_put((index[index >= 0],), found[index >= 0])


def grid_log_prob(policy: Policy, batch: EvaluationBatch, grid: Tensor, read_mask: Tensor | None = None) -> Tensor:
    """Return each response's log-probability under every vector of a grid ``(M, K)``, or where it is wanted.

    Returns:
        ``(N, M)`` in nats, 0 where it is not wanted.
    """
    if read_mask is None:
        read_mask = torch.ones(len(batch), len(grid), dtype=torch.bool)
    return read_by_prompt(
        batch,
        read_mask,
        lambda prompts, tokens, mask: policy.response_log_prob(
            prompts, grid.expand(len(prompts), -1, -1), tokens, mask
        ),
    )


class PreferenceInformation(EvaluationCallback):
    """I(Y; W | X) over the evaluation grid and, for each objective, the information of its feedback; in nats.

    At every evaluation it logs ``information/preference`` with its 95 % t interval over prompts (``.._low``,
    ``.._high``) and ``information/ceiling``, which is ``log M``. It costs M passes over the evaluation responses. From
    the training pairs since the last evaluation it logs ``information/feedback/NAME`` with its t interval: a lower
    bound of I(Y; C_k | X, W), see :func:`~miepo.metrics.feedback_information`.

    Args:
        every: W is uniform on every so many vectors of the grid, from its first one on: 2 of a grid of 11 leaves 6
            vectors, both ends among them, for less than a third of the time.

    Raises:
        UserError: ``every`` is below 1, or leaves a single vector.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"PreferenceInformation.every must be at least 1, got {every}")
        self.every = every
        self.pairs: list[Tensor] = []  # (B, K) each
        self.trainer: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs since the last evaluation, of all processes."""
        pairs = gathered_rows(self.trainer, self.pairs)
        return {"pairs": torch.cat(pairs) if pairs else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pairs = state_dict["pairs"]
        self.pairs = [] if pairs is None or not self.trainer.is_global_zero else [pairs]

    def start(self, trainer: Trainer, module: Any, grid: Tensor) -> None:
        self.trainer = trainer
        vectors = len(range(0, len(grid), self.every))
        if vectors == 1 < len(grid):
            raise UserError(
                f"PreferenceInformation.every must leave two of the grid's {len(grid)} vectors, got {self.every}"
            )
        module.metrics[METRIC] = PreferenceInformationMetric(vectors)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "feedback_information" in outputs:  # methods that judge pairs
            self.pairs.append(outputs["feedback_information"].cpu())

    def on_evaluation_batch(self, trainer: Trainer, module: Any, batch: EvaluationBatch) -> None:
        grid = trainer.datamodule.grid[:: self.every]  # type: ignore[attr-defined]
        policy: Policy = module.policy
        rows = batch.grid_index % self.every == 0  # (N,)
        if not rows.any():
            return
        with policy.evaluating():
            log_prob = grid_log_prob(policy, batch, grid, rows.unsqueeze(1).expand(-1, len(grid)))[rows]  # (n, M)
        module.metrics[METRIC].update(
            log_prob, batch.grid_index[rows] // self.every, torch.tensor(batch.positions)[rows.cpu()]
        )

    def on_evaluation_end(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        metric = module.metrics[METRIC]
        values = {f"information/{key}": value.float() for key, value in metric.compute().items()}
        metric.reset()
        pairs = gathered_rows(trainer, self.pairs)
        if pairs:
            # in an order that does not tell which process had which
            interval = t_interval(torch.cat(pairs).sort(0).values)  # (K,) each
            for k, name in enumerate(module.names):
                values |= interval_figures(f"information/feedback/{name}", [part[k].float() for part in interval])
            self.pairs = []
        return {k: v for k, v in values.items() if not v.isnan()}
