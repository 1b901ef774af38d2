"""How much responses tell about their preference vector, and pairs about their feedback; all in nats."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from miepo.metrics.steerability import t_interval


def pointwise_information(log_prob: Tensor, grid_index: Tensor) -> Tensor:
    """Return ``log pi(y | x, w_i) - log mean_j pi(y | x, w_j)`` of each response.

    For W uniform on the grid and y sampled under w_i, its mean is an unbiased estimate of I(Y; W | X): the policy's
    likelihood is exact. No value exceeds ``log M``.

    Args:
        log_prob: ``(N, M)`` log-probability of each response under every preference vector of the grid.
        grid_index: ``(N,)`` the vector it was sampled under.

    Returns:
        ``(N,)``.

    >>> pointwise_information(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))  # only w_0 can say this: log 2
    tensor([0.6931])
    """
    return _information(log_prob.gather(1, grid_index.unsqueeze(1)), log_prob)


def infonce_bound(log_prob: Tensor, counterfactual_log_prob: Tensor) -> Tensor:
    """Return the in-batch lower bound of I(Y; W | X): ``log pi(y|x,w+) - log mean over {w+, w-} of pi(y|x,w)``.

    Args:
        log_prob: ``(..)`` log-probability of responses under w+.
        counterfactual_log_prob: ``(.., C)`` under each w-.

    Returns:
        ``(..)``, at most ``log(1 + C)``.
    """
    own = log_prob.unsqueeze(-1)
    return _information(own, torch.cat([own, counterfactual_log_prob], -1))


def _information(own: Tensor, every: Tensor) -> Tensor:
    """Return ``own - log mean exp(every)`` for ``own`` ``(.., 1)`` among ``every`` ``(.., M)``.

    Never above ``log M``.
    """
    # differences first: one of them is exactly 0, so that rounding cannot lift the value over its ceiling
    return log(every.shape[-1]) - (every - own).logsumexp(-1)


def feedback_information(margin: Tensor, labels: Tensor, beta_c: float) -> Tensor:
    """Return a lower bound of I(Y; C_k | X, W) from Eq. 8: ``log 2 - L_YC,k`` on pairs with a label, NaN on others.

    The two responses are exchangeable, so a label has entropy ``log 2``, and the DPO loss is the cross-entropy of a
    predictor of it, whatever loss the policy is trained with. On fresh pairs, before the step that trains on them, the
    bound is not biased by fitting.

    Args:
        margin: ``(B, K)`` implicit reward of the first response minus that of the second, of each objective's pair.
        labels: ``(B, K)``.
        beta_c: Scale of the predictor's logits.
    """
    return torch.where(labels == 0, torch.nan, log(2) + F.logsigmoid(beta_c * margin * labels))


class PreferenceInformationMetric(Metric):
    """I(Y; W | X) for W uniform on a grid, with a t interval over prompts; in nats.

    Args:
        grid_size: ``M``, the number of preference vectors; the ceiling is ``log M``.
    """

    full_state_update = False
    information: list[Tensor]
    prompt: list[Tensor]

    def __init__(self, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.add_state("information", [], dist_reduce_fx="cat")
        self.add_state("prompt", [], dist_reduce_fx="cat")

    def update(self, log_prob: Tensor, grid_index: Tensor, prompt: Tensor) -> None:
        """Add responses: ``(N, M)`` log-probabilities, ``(N,)`` sampling index and ``(N,)`` index of the prompt."""
        self.information.append(pointwise_information(log_prob.double(), grid_index))
        self.prompt.append(prompt.to(log_prob.device))

    def compute(self) -> dict[str, Tensor]:
        """Return ``preference`` (the estimate), ``preference_low``, ``preference_high``, ``ceiling``."""
        values, prompts = dim_zero_cat(self.information), dim_zero_cat(self.prompt)
        _, inverse = prompts.unique(return_inverse=True)
        sums, counts = (
            torch.zeros(int(inverse.max()) + 1, dtype=torch.float64, device=values.device).index_add_(0, inverse, x)
            for x in (values.double(), torch.ones_like(values, dtype=torch.float64))
        )
        mean, low, high = t_interval(sums / counts)
        return {
            "preference": mean,
            "preference_low": low,
            "preference_high": high,
            "ceiling": torch.tensor(log(self.grid_size)),
        }
