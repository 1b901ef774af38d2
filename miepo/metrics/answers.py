"""What metrics of an evaluation share: the rewards of its answers by preference vector and prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class AnswerMetric(Metric):
    """Keeps every answer's rewards; exact under any split into batches or processes.

    Args:
        grid: ``(M, K)`` preference vectors of the evaluation.
    """

    full_state_update = False
    grid: Tensor
    scores: list[Tensor]
    grid_index: list[Tensor]
    positions: list[Tensor]

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("grid", grid, persistent=False)
        for name in ("scores", "grid_index", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, grid_index: Tensor, positions: Tensor) -> None:
        """Add answers: rewards ``(N, K)``, and the index of their preference vector and of their prompt ``(N,)``."""
        self.scores.append(scores.double().to(self.grid.device))
        self.grid_index.append(grid_index.to(self.grid.device))
        self.positions.append(positions.to(self.grid.device))

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return rewards ``(N, K)`` float64, grid index and prompt ``(N,)``.

        In an order that does not tell who had which.
        """
        if isinstance(self.scores, list) and not self.scores:  # what all processes have together is one tensor
            none = torch.zeros(0, dtype=torch.long)
            return torch.zeros(0, self.grid.shape[1], dtype=torch.float64), none, none
        scores, index, positions = (dim_zero_cat(x) for x in (self.scores, self.grid_index, self.positions))
        order = torch.argsort(positions * len(self.grid) + index, stable=True)
        return scores[order], index[order], positions[order]
