"""The router: which objective's feedback is active, P(Z = k | W = w) = w_k."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from miepo.recorded import Recorded


class Router(Recorded, ABC):
    """Turns preference vectors into the weights with which the alignment losses are summed.

    The weights are made with w+ before scoring and travel in the batch: an objective with weight 0 for a prompt is not
    asked about it.
    """

    @abstractmethod
    def route(self, preference: Tensor, uniform: Tensor) -> Tensor:
        """Return weights ``(B, K)`` whose expectation over ``uniform`` is ``preference``.

        Args:
            preference: ``(B, K)`` w+.
            uniform: ``(B,)`` one draw in [0, 1) for each prompt.
        """

    @staticmethod
    def combine(losses: Tensor, routing: Tensor) -> Tensor:
        """Return the routed alignment loss of Eq. 13, ``(B, K), (B, K) -> (B,)``."""
        return (losses * routing).sum(-1)


class ExpectationRouter(Router):
    """The exact sum over objectives of Eq. 13: the weights are w+ itself."""

    def route(self, preference: Tensor, uniform: Tensor) -> Tensor:
        return preference


class SampleRouter(Router):
    """One objective Z ~ w+ per prompt: unbiased, at 1/K of the scoring cost and with more variance."""

    def route(self, preference: Tensor, uniform: Tensor) -> Tensor:
        cumulative = preference.cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]  # exactly 1 at the end, whatever the rounding
        chosen = (uniform.unsqueeze(-1) >= cumulative).sum(-1)
        return torch.nn.functional.one_hot(chosen, preference.shape[-1]).to(preference.dtype)
