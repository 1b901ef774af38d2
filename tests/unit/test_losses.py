from __future__ import annotations

from math import exp, log

import pytest
import torch

from miepo.losses import alignment_loss, exploration_loss, implicit_reward, total_loss
from miepo.router import ExpectationRouter


def rewards(b: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def labels(b: int = 6, k: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 2, (b, k), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def test_implicit_reward_ignores_padding() -> None:
    log_prob, reference = torch.tensor([[-1.0, -2.0, 7.0]]), torch.tensor([[-2.0, -2.5, -torch.inf]])
    assert implicit_reward(log_prob, reference, torch.tensor([[True, True, False]])).tolist() == [1.5]


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


def test_exploration_loss_is_equation_12_with_one_counterfactual() -> None:
    r, c = rewards(), rewards(seed=5).unsqueeze(-1)
    expected = -torch.nn.functional.logsigmoid(0.01 * r - 0.01 * c.squeeze(-1))
    torch.testing.assert_close(exploration_loss(r, c, 0.01), expected)


def test_exploration_loss_is_infonce_with_more() -> None:
    r = rewards(4)
    c = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    loss = exploration_loss(r, c, 0.7)
    for b in range(4):
        for y in range(2):
            positive = exp(0.7 * r[b, y].item())
            everything = positive + sum(exp(0.7 * c[b, y, j].item()) for j in range(5))
            assert loss[b, y].item() == pytest.approx(-log(positive / everything), rel=1e-12)


def test_exploration_gradient_flows_through_the_counterfactual_only() -> None:
    r, c = rewards(), rewards(seed=5)
    own, other = torch.autograd.grad(exploration_loss(r, c.unsqueeze(-1), 0.5).sum(), [r, c], allow_unused=True)
    assert own is None
    # d/db log(1 + exp(b - a)) = beta sigmoid(b - a) > 0: an unlikelihood term on w-
    torch.testing.assert_close(other, 0.5 * torch.sigmoid(0.5 * (c - r)).detach())


def test_total_loss_by_hand_and_empty_anchors() -> None:
    alignment = torch.tensor([1.0, 3.0])
    exploration = torch.tensor([[0.5, 1.5], [2.0, 4.0]])
    anchors = torch.tensor([[True, True], [True, False]])
    # ((1 + (0.5 + 1.5) / 2) + (3 + (2 + 0) / 2)) / 2
    assert total_loss(alignment, exploration, anchors).item() == 3.0
    assert total_loss(alignment, None, anchors).item() == 2.0


def test_an_empty_anchor_has_no_gradient() -> None:
    c = torch.zeros(1, 2, 1, requires_grad=True)
    exploration = exploration_loss(torch.zeros(1, 2), c, 0.1)
    total_loss(torch.zeros(1), exploration, torch.tensor([[True, False]])).backward()
    assert c.grad[0, 0, 0] != 0
    assert c.grad[0, 1, 0] == 0
