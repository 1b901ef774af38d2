from __future__ import annotations

import pytest
import torch

from miepo.preferences import DirichletPreferences, draw_preferences, routing_draws
from miepo.router import ExpectationRouter, Router, SampleRouter
from miepo.seeding import RandomStream, generator

ROUTERS = Router.__subclasses__()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_contract_weights_are_unbiased_and_on_the_simplex(router: type[Router], k: int) -> None:
    n = 20_000
    w = torch.distributions.Dirichlet(torch.full((k,), 0.7)).sample((1,)) if k > 1 else torch.ones(1, 1)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # every quantile once: the mean is exact to 1 / n
    routing = router().route(w.double().expand(n, k), uniform)
    assert routing.shape == (n, k)
    assert (routing >= 0).all()
    torch.testing.assert_close(routing.sum(-1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(routing.mean(0), w[0].double(), rtol=0, atol=2 / n)


def test_sampled_routing_gives_the_gradient_of_the_expectation_on_average() -> None:
    """The mean over Z of the sampled gradient equals the gradient of the exact sum."""
    theta = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    exact = torch.autograd.grad(ExpectationRouter.combine(theta.square().unsqueeze(0), w).sum(), theta)[0]
    n = 1000
    routing = SampleRouter().route(w.expand(n, 3), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    sampled = torch.autograd.grad(SampleRouter.combine(theta.square().expand(n, 3), routing).mean(), theta)[0]
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-12)


def test_the_routed_objective_is_independent_of_how_w_was_drawn() -> None:
    """Of Dirichlet draws the routed objective has weight E[sum_k w_k^2]; with the stream of the preferences, another."""
    n, alpha = 4000, 0.5
    epochs, positions = [0] * n, [*range(n)]
    preference, _ = draw_preferences(DirichletPreferences(alpha), 3, epochs, positions, 0, 2)
    routed = SampleRouter().route(preference, routing_draws(3, epochs, positions))
    # Var w = 1 / (4 (2 alpha + 1)), so E[w^2 + (1 - w)^2] = 1/2 + 2 Var w
    expected = 0.5 + 0.5 / (2 * alpha + 1)
    assert (routed * preference).sum(-1).mean().item() == pytest.approx(expected, abs=4 * 0.3 / n**0.5)


def test_sampled_routing_never_draws_an_objective_of_weight_zero() -> None:
    w = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3)
    assert SampleRouter().route(w, torch.tensor([0.0, 0.5, 1 - 2**-24]))[:, 1].tolist() == [1, 1, 1]


def test_the_largest_draw_stays_in_range() -> None:
    """A float64 just below 1 would round to 1 in float32."""
    routing = SampleRouter().route(torch.tensor([[0.3, 0.7]]), torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert routing.tolist() == [[0.0, 1.0]]


def test_draws_are_those_of_the_place_in_the_run() -> None:
    epochs, positions = [0, 0, 3], [0, 7, 7]
    draws = routing_draws(5, epochs, positions)
    assert draws.dtype == torch.float64
    assert draws.tolist() == [
        generator(RandomStream.ROUTING, 5, e, p).random() for e, p in zip(epochs, positions, strict=True)
    ]
    with pytest.raises(ValueError, match="longer"):
        routing_draws(5, [0], [0, 1])


def test_rounding_of_the_preference_moves_no_draw() -> None:
    """Weights that sum to a little more than 1, of which the last is not drawn too often."""
    w = torch.tensor([[0.5, 0.5002]])
    assert SampleRouter().route(w, torch.tensor([0.49995]))[0].tolist() == [0.0, 1.0]
    assert SampleRouter().route(w, torch.tensor([0.4998]))[0].tolist() == [1.0, 0.0]


def test_a_draw_has_a_column_for_every_objective() -> None:
    assert SampleRouter().route(torch.ones(2, 3, dtype=torch.float64) / 3, torch.zeros(2)).shape == (2, 3)


def test_expectation_is_the_preference_itself() -> None:
    w = torch.rand(3, 2)
    assert ExpectationRouter().route(w, torch.rand(3)) is w
