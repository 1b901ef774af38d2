from __future__ import annotations

import numpy as np
import pytest
import torch

from miepo.metrics import (
    AnswerSums,
    ParetoFrontMetric,
    conditional_reward_dispersion,
    estimate_hypervolume,
    hypervolume,
    mean_inner_product,
    mip_parts,
    reward_overlap,
)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(k: int, seed: int) -> None:
    """Monte Carlo is the second source: points in [-1, 2]^K that some mean vector dominates."""
    g = torch.Generator().manual_seed(seed)
    means = torch.rand(6, k, generator=g, dtype=torch.float64) * 3 - 1.3  # some below the reference point
    n = 400_000
    points = torch.rand(n, k, generator=g, dtype=torch.float64) * 3 - 1
    share = (points.unsqueeze(1) <= means).all(-1).any(-1).double().mean().item()
    sd = (share * (1 - share) / n) ** 0.5
    assert hypervolume(means, -1.0).item() == pytest.approx(share * 3**k, abs=5 * sd * 3**k)


def test_hypervolume_by_hand() -> None:
    # above (-1, -1): rectangles 2 x 1 and 1 x 2 that share the unit square
    assert hypervolume(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), -1.0) == 3
    assert hypervolume(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.5, -0.5], [1.0, 0.0]]), -1.0) == 3
    assert hypervolume(torch.tensor([[-2.0, 5.0]]), -1.0) == 0
    assert hypervolume(torch.zeros(1, 2), -1.0) == 1  # a policy at the mean of the normalisation
    assert hypervolume(torch.full((3, 2), torch.nan), -1.0) == 0


def test_hypervolume_of_one_objective_is_the_best_above_the_reference_point() -> None:
    column = torch.tensor([[0.5], [2.0], [torch.nan], [-3.0]])
    assert hypervolume(column, -1.0) == 3
    assert hypervolume(column[2:], -1.0) == hypervolume(column[:0], -1.0) == 0
    assert hypervolume(column[:1], 0.0) == 0.5
    assert hypervolume(torch.tensor([[0.0, 2.0]]), -1.0) == 3  # one vector of two objectives is another thing
    assert hypervolume(column, -1.0).dtype == torch.float64


def test_hypervolume_does_not_depend_on_the_order_of_objectives() -> None:
    means = torch.rand(5, 3)
    torch.testing.assert_close(hypervolume(means, -1.0), hypervolume(means[:, [2, 0, 1]], -1.0))


def test_mip_by_hand() -> None:
    w = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert mean_inner_product(w, torch.tensor([[2.0, 9.0], [1.0, 3.0]])) == 2
    assert mean_inner_product(w, torch.tensor([[2.0, 9.0], [torch.nan, 3.0]])) == 2  # not measured


def test_parts_of_mip_by_hand() -> None:
    """Preferences that are no balanced grid: mean weights (5/6, 1/6), mean rewards (2, 5)."""
    w = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    means = torch.tensor([[3.0, 1.0], [1.0, 12.0], [2.0, 2.0], [torch.nan, 3.0]])
    level, covariance = mip_parts(w, means)
    assert level.item() == pytest.approx(5 / 6 * 2 + 1 / 6 * 5)
    assert (level + covariance).item() == pytest.approx((3 + 6.5 + 2) / 3)


def test_crd_by_hand() -> None:
    covariances = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 5.0]]])
    assert conditional_reward_dispersion(covariances).item() == pytest.approx((3 + 5) / 2)


def test_overlap_by_hand() -> None:
    grid = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    index = torch.tensor([0, 0, 0, 0, 1, 1])
    same = torch.tensor([[1.0], [1.0], [5.0], [5.0], [1.0], [5.0]])
    assert reward_overlap(same, index, grid[:, :1]).item() == pytest.approx(1.0)
    # first objective: (1, 1, 1, 5) against (1, 5): 1/2 + 1/4; second: apart
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [5.0, 0.0], [1.0, 9.0], [5.0, 9.0]])
    assert reward_overlap(scores, index, grid).item() == pytest.approx((0.75 + 0.0) / 2)
    broken = torch.cat([scores, torch.tensor([[torch.nan, 4.0]])])
    assert reward_overlap(broken, torch.cat([index, torch.tensor([1])]), grid).item() == pytest.approx(0.375)


@pytest.mark.parametrize("bins", [None, 4])
def test_overlap_is_that_of_numpys_histograms(bins: int | None) -> None:
    """Objectives of other ranges, far from 0 and below it; the last grid vector is the second's neighbour, too."""
    g = torch.Generator().manual_seed(0)
    grid = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0]])
    index = torch.randint(0, 3, (90,), generator=g)
    scores = torch.randn(90, 2, generator=g) * torch.tensor([0.3, 5.0]) + torch.tensor([-7.0, 40.0])
    scores[:, 0] += 0.4 * index
    scores[5, 1] = torch.inf
    found = reward_overlap(scores, index, grid) if bins is None else reward_overlap(scores, index, grid, bins)
    kept, of = scores[scores.isfinite().all(1)].double().numpy(), index[scores.isfinite().all(1)].numpy()
    each = []
    for i, j in ((0, 1), (1, 2), (2, 1)):
        for k in range(2):
            edges = np.linspace(kept[:, k].min(), kept[:, k].max(), (bins or 10) + 1)
            p, q = (np.histogram(kept[of == m, k], edges)[0] for m in (i, j))
            each.append(np.minimum(p / p.sum(), q / q.sum()).sum())
    assert 0.2 < np.mean(each) < 0.9
    assert found.item() == pytest.approx(np.mean(each))


def test_overlap_does_not_depend_on_the_unit_of_the_rewards() -> None:
    grid, index = torch.eye(2), torch.tensor([0, 1]).repeat(30)
    scores = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + grid[index]
    torch.testing.assert_close(
        reward_overlap(scores / 100 + 7, index, grid), reward_overlap(scores, index, grid), atol=0.1, rtol=0
    )
    assert (reward_overlap(scores / 100, index, grid) < 0.9).all()


def test_what_an_evaluation_holds_is_in_no_checkpoint() -> None:
    assert dict(ParetoFrontMetric(torch.eye(2), -1.0).state_dict()) == {}


def test_overlap_of_constant_rewards_is_whole() -> None:
    assert reward_overlap(torch.full((4, 2), 7.0), torch.tensor([0, 0, 1, 1]), torch.eye(2)).item() == pytest.approx(1)


def test_overlap_compares_nearest_neighbours_only() -> None:
    """Three preferences whose rewards move step by step: neighbours overlap by half, the ends not at all."""
    grid = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    index = torch.arange(3).repeat_interleave(2)
    scores = torch.tensor([0.0, 3.0, 3.0, 6.0, 6.0, 9.0]).unsqueeze(1).expand(-1, 2)
    assert reward_overlap(scores, index, grid).item() == pytest.approx(0.5)


def test_metric_equals_numpy_and_does_not_depend_on_batches() -> None:
    g = torch.Generator().manual_seed(0)
    grid = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    index, scores = torch.randint(0, 3, (50,), generator=g), torch.randn(50, 2, generator=g) + 100
    whole, parts = ParetoFrontMetric(grid, -1.0), ParetoFrontMetric(grid, -1.0)
    prompts = torch.arange(50) % 9
    whole.update(scores, index, prompts)
    for part in torch.arange(50).split(7)[::-1]:
        parts.update(scores[part], index[part], prompts[part])
    groups = [scores[index == m].double().numpy() for m in range(3)]
    means, covariances = whole.moments()
    np.testing.assert_allclose(means, [group.mean(0) for group in groups], rtol=1e-12)
    np.testing.assert_allclose(covariances, [np.cov(group.T) for group in groups], rtol=1e-6, atol=1e-9)
    result = whole.compute()
    assert set(result) == {
        "hv", "hv_above_chance", "hv_p", "hv_corrected", "hv_corrected_low", "hv_corrected_high", "mip", "mip_level",
        "mip_covariance", "crd", "left_out", "sd", "means",
    }  # fmt: skip
    assert all(value.dtype == torch.float64 for value in result.values())
    assert result["hv"] == hypervolume(means, -1.0)
    assert result["mip"].item() == pytest.approx(mean_inner_product(grid, means).item())
    assert torch.equal(
        torch.stack([result["mip_level"], result["mip_covariance"]]), torch.stack(mip_parts(grid, means))
    )
    estimate = estimate_hypervolume(AnswerSums.of(*whole.answers(), 3), -1.0)
    for key, value in (
        ("hv_above_chance", estimate.above_chance), ("hv_p", estimate.p_value), ("hv_corrected", estimate.corrected),
        ("hv_corrected_low", estimate.low), ("hv_corrected_high", estimate.high),
    ):  # fmt: skip
        assert result[key].item() == value
    other = ParetoFrontMetric(grid, 99.0)
    other.update(scores, index, prompts)
    assert other.compute()["hv"] == hypervolume(means, 99.0) < result["hv"]
    assert result["crd"].item() == pytest.approx(np.mean([np.linalg.det(np.cov(g.T)) for g in groups]), rel=1e-6)
    np.testing.assert_allclose(result["sd"], np.mean([g.std(0, ddof=1) for g in groups], axis=0), rtol=1e-7)
    for key, value in parts.compute().items():
        torch.testing.assert_close(value, result[key])


def test_a_response_without_a_score_does_not_count() -> None:
    grid = torch.eye(2)
    a, b = ParetoFrontMetric(grid, -1.0), ParetoFrontMetric(grid, -1.0)
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    a.update(scores, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    b.update(
        torch.cat([scores, torch.tensor([[torch.nan, 1.0]])]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    )
    torch.testing.assert_close(b.compute()["means"], a.compute()["means"])
    assert (a.compute()["left_out"], b.compute()["left_out"]) == (0, 1)


def test_answers_are_in_the_order_of_prompts_and_vectors() -> None:
    """And of one prompt and vector in the order in which they came."""
    metric = ParetoFrontMetric(torch.eye(2), -1.0)
    metric.update(torch.arange(8.0).view(4, 2), torch.tensor([1, 0, 1, 0]), torch.tensor([3, 3, 0, 9]))
    metric.update(torch.arange(80.0).view(40, 2), torch.tensor([0] * 40), torch.tensor([5] * 40))
    scores, index, positions = metric.answers()
    assert positions.tolist() == [0, 3, 3, *[5] * 40, 9]
    assert index[:3].tolist() == [1, 0, 1]
    assert scores[:3, 0].tolist() == [4.0, 2.0, 0.0]
    assert scores[3:43, 0].tolist() == list(range(0, 80, 2))
    assert scores.dtype == torch.float64
    none = ParetoFrontMetric(torch.eye(2), -1.0).answers()
    assert [(x.shape, x.dtype) for x in none] == [((0, 2), torch.float64), ((0,), torch.long), ((0,), torch.long)]


def test_reset_forgets() -> None:
    metric = ParetoFrontMetric(torch.eye(2), -1.0)
    metric.update(torch.ones(2, 2), torch.tensor([0, 1]), torch.tensor([0, 0]))
    metric.reset()
    assert metric.moments()[0].isnan().all()
