from __future__ import annotations

from math import exp, log

import pytest
import torch

from miepo.losses import alignment_loss, implicit_reward, mean_distance, supervised_loss, total_loss
from miepo.router import ExpectationRouter


def rewards(b: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def labels(b: int = 6, k: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 2, (b, k), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def test_implicit_reward_ignores_padding() -> None:
    log_prob, reference = torch.tensor([[-1.0, -2.0, 7.0]]), torch.tensor([[-2.0, -2.5, -torch.inf]])
    mask = torch.tensor([[True, True, False]])
    assert implicit_reward(log_prob, reference, mask).tolist() == [1.5]
    assert implicit_reward(log_prob[None], reference[None], mask[None]).tolist() == [[1.5]]


def test_alignment_loss_by_hand() -> None:
    # Eq. 8 with r = (2, 1), beta_c = 0.5: margin 0.5 as the first is preferred, -0.5 as the second is
    loss = alignment_loss(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, -1.0, 0.0]]), beta_c=0.5)
    expected = [log(1 + exp(-0.5)), log(1 + exp(0.5)), log(2)]
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_one_hot_preference_is_the_single_objective() -> None:
    r, y = rewards(), labels()
    every = alignment_loss(r, y, 0.1)
    for k in range(3):
        routed = ExpectationRouter.combine(every, torch.eye(3, dtype=torch.float64)[k].expand(6, 3))
        alone = alignment_loss(r, y[:, k : k + 1], 0.1)[:, 0]
        assert torch.equal(routed, alone)


def test_permuting_objectives_permutes_columns_and_nothing_else() -> None:
    r, y, order = rewards(), labels(), [2, 0, 1]
    w = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((6,))
    loss, permuted = alignment_loss(r, y, 0.1), alignment_loss(r, y[:, order], 0.1)
    assert torch.equal(loss[:, order], permuted)
    torch.testing.assert_close(
        ExpectationRouter.combine(loss, w), ExpectationRouter.combine(permuted, w[:, order]), rtol=1e-15, atol=1e-15
    )


def test_unlabelled_pairs_have_no_gradient_even_where_the_reward_is_infinite() -> None:
    r = torch.tensor([[0.3, -0.2], [torch.inf, 1.0], [torch.nan, 1.0]], requires_grad=True)
    loss = alignment_loss(r, torch.zeros(3, 2), 0.1)
    assert torch.equal(loss, torch.full((3, 2), log(2)))
    (gradient,) = torch.autograd.grad(loss.sum(), r)
    assert torch.equal(gradient, torch.zeros(3, 2))


def test_supervised_loss_by_hand() -> None:
    log_prob, mask = torch.tensor([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert supervised_loss(log_prob, mask).item() == pytest.approx(2)  # per token of this batch
    assert supervised_loss(log_prob, mask, tokens=4.0).item() == pytest.approx(1.5)  # of all processes, say


def test_mean_distance_is_per_token_that_counts() -> None:
    one = torch.tensor([[-1.0, -2.0, 7.0, 7.0], [-3.0, 0.0, 0.0, 0.0], [0.0] * 4])
    other = torch.tensor([[-2.0, -5.0, 0.0, 0.0], [-7.0, 1.0, 1.0, 1.0], [1.0] * 4])
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    assert mean_distance(one, other, mask).tolist() == [2.0, 4.0, 0.0]
    assert mean_distance(one.unsqueeze(0), other.unsqueeze(0), mask.unsqueeze(0)).tolist() == [[2.0, 4.0, 0.0]]


def test_total_loss_by_hand() -> None:
    alignment, exploration = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.5])
    assert total_loss(alignment, exploration).item() == 3.0
    assert total_loss(alignment, None).item() == 2.0
