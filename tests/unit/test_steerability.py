"""Obedience: slopes against numpy's least squares, intervals against their promise, words against the numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from miepo.metrics import (
    AnswerSums,
    ParetoFrontMetric,
    SteerabilityMetric,
    estimate_hypervolume,
    follows,
    hypervolume,
    mip_parts,
    preference_slopes,
    rank_correlation,
    t_interval,
)
from miepo.metrics.resampling import permuted_means, resampled_moments
from miepo.preferences import evaluation_grid
from miepo.seeding import RandomStream, generator


def answers(
    seed: int, prompts: int, grid: torch.Tensor, means: torch.Tensor, repeat: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards with what the answers to a prompt share (sd 0.6) and what each has of its own (sd 0.8)."""
    rng, (m, k) = np.random.default_rng([17, seed]), means.shape
    shared = rng.normal(size=(prompts, 1, 1, k)) * 0.6
    scores = means.numpy()[:, None] + shared + rng.normal(size=(prompts, m, repeat, k)) * 0.8
    index = torch.arange(m).repeat_interleave(repeat).repeat(prompts)
    return torch.tensor(scores).flatten(0, 2), index, torch.arange(prompts).repeat_interleave(m * repeat)


@pytest.mark.parametrize(("k", "points"), [(1, None), (2, 5), (2, 11), (3, None)])
def test_slopes_are_least_squares(k: int, points: int | None) -> None:
    grid = evaluation_grid(k, points) if k > 1 else torch.tensor([[1.0], [0.5]])
    scores, index, positions = answers(k, 6, grid, 2 * grid.double(), repeat=2)
    scores[3, 0] = torch.nan
    scores[:1, -1] = torch.inf
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    slopes = preference_slopes(scores[order], index[order], 7 * positions[order], grid)
    assert slopes.shape == (6, k, k)
    for p in range(6):
        for j in range(k):
            keep = (positions == p) & scores[:, j].isfinite()
            for i in range(k):
                expected = np.polyfit(grid.double()[index[keep], i].numpy(), scores[keep, j].numpy(), 1)[0]
                assert slopes[p, j, i].item() == pytest.approx(expected, abs=1e-9)


def test_no_slope_without_two_weights() -> None:
    grid = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 5.0]])
    slopes = preference_slopes(scores, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), grid)
    assert slopes[0, 0, 0] == -2
    assert slopes[0, 1].isnan().all()  # one reward
    assert slopes[1].isnan().all()  # one preference vector
    assert preference_slopes(scores[:0], torch.zeros(0, dtype=torch.long), torch.zeros(0), grid).shape == (0, 2, 2)


def test_t_interval_is_scipys() -> None:
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, low, high = t_interval(values)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose([low.numpy(), high.numpy()], [expected.low, expected.high])
    values[4, 1] = torch.nan
    seven = values[[0, 1, 2, 3, 5, 6, 7, 8]]
    torch.testing.assert_close(t_interval(values)[1][1], t_interval(seven)[1][1])
    for few in (values[:1], values[:0]):
        assert t_interval(few)[1].isnan().all()


def test_intervals_of_slopes_cover_as_often_as_they_say() -> None:
    """Ten prompts, 400 evaluations: 95 % within 4 sd, for a policy that obeys and one that does not."""
    grid = evaluation_grid(2, 5).double()
    for size in (0.0, 1.5):
        inside = 0
        for seed in range(400):
            _, low, high = t_interval(preference_slopes(*answers(seed, 10, grid, size * grid), grid))
            inside += bool(low[0, 0] <= size <= high[0, 0])
        assert abs(inside / 400 - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5


def test_rank_correlation() -> None:
    grid = evaluation_grid(2, 5)
    means = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 1.0], [5.5, 1.0], [9.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rank_correlation(means, grid)
    assert found[0].item() == pytest.approx(1)
    assert found[1].isnan()  # the same reward everywhere
    assert rank_correlation(-means, grid)[0].item() == pytest.approx(-1)
    means[1] = torch.nan
    assert rank_correlation(means, grid)[0].item() == pytest.approx(1)
    means[2:4] = torch.nan
    assert rank_correlation(means, grid)[0].item() == pytest.approx(1)  # two are enough
    means[4] = torch.nan
    assert rank_correlation(means, grid).isnan().all()
    assert found.dtype == torch.float64


def test_the_metric_does_not_depend_on_batches() -> None:
    grid = evaluation_grid(3).float()
    scores, index, positions = answers(0, 4, grid, grid.double())
    whole, parts = SteerabilityMetric(grid), SteerabilityMetric(grid)
    whole.update(scores, index, positions)
    for part in torch.arange(len(scores)).split(5)[::-1]:
        parts.update(scores[part], index[part], positions[part])
    result = whole.compute()
    assert set(result) == {"slope", "low", "high", "rank"}
    means = torch.stack([scores[index == i].mean(0) for i in range(len(grid))])
    torch.testing.assert_close(result["rank"], rank_correlation(means, grid))
    for key, value in parts.compute().items():
        assert torch.equal(value, result[key]), key
    assert (result["low"] < result["slope"]).all()
    none = SteerabilityMetric(grid)
    none.update(scores[:0], index[:0], positions[:0])
    assert none.compute()["slope"].isnan().all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.9, 1.4, 2.4), "x follows its weight: +1.9 sd [+1.4, +2.4]"),
        ((-0.9, -1.4, -0.4), "x goes against its weight: -0.9 sd [-1.4, -0.4]"),
        ((0.1, -0.3, 0.5), "x: no evidence that it follows its weight: +0.1 sd [-0.3, +0.5]"),
        ((0.4, 0.1, 0.7), "x follows its weight: +0.4 sd [+0.1, +0.7]"),
        ((0.4, 0.0, 0.8), "x: no evidence that it follows its weight: +0.4 sd [+0.0, +0.8]"),
        ((-0.4, -0.8, 0.0), "x: no evidence that it follows its weight: -0.4 sd [-0.8, +0.0]"),
        ((0.3, float("nan"), float("nan")), "x: no evidence that it follows its weight: +0.3 sd, without an interval"),
        ((float("nan"),) * 3, "x: its slope is not known: there are no rewards under two different weights"),
    ],
)
def test_in_words(numbers: tuple[float, float, float], said: str) -> None:
    assert follows("x", *numbers) == said


def test_parts_of_mip() -> None:
    grid = evaluation_grid(2, 5).double()
    means = torch.stack([grid[:, 0] * 3 - 1, grid[:, 1] ** 2], 1)
    level, covariance = mip_parts(grid, means)
    assert float(level + covariance) == pytest.approx(float((grid * means).sum(-1).mean()))
    centred = (grid - grid.mean(0)) * (means - means.mean(0))
    assert float(covariance) == pytest.approx(float(centred.sum(-1).mean()))
    assert float(mip_parts(grid, torch.ones_like(grid) * 7)[1]) == pytest.approx(0)
    means[1] = torch.nan
    rest = [0, 2, 3, 4]
    expected = (grid[rest].mean(0) * means[rest].mean(0)).sum()
    assert float(mip_parts(grid, means)[0]) == pytest.approx(float(expected))
    assert mip_parts(grid.float(), means)[0].dtype == means.dtype
    three = evaluation_grid(3).double()
    level, covariance = mip_parts(three, three**2)
    assert float(level) == pytest.approx(float((three.mean(0) * (three**2).mean(0)).sum()))
    assert float(level + covariance) == pytest.approx(float((three**3).sum(-1).mean()))


def test_permuted_preferences_keep_prompts_and_rewards() -> None:
    grid = evaluation_grid(2, 5)
    scores, index, positions = answers(0, 7, grid, 2 * grid.double())
    sums = AnswerSums.of(scores, index, positions, 5)
    means = permuted_means(sums, 50)
    assert means.shape == (50, 5, 2)
    torch.testing.assert_close(means.mean(1), scores.mean(0).expand(50, 2))
    assert len({tuple(each.flatten().tolist()) for each in means}) > 40


def test_the_hypervolume_of_a_policy_that_ignores_its_preference_is_not_above_chance() -> None:
    """Centred at 0, and p <= .05 in about one of twenty; with a front it is found."""
    grid = evaluation_grid(2, 5).double()
    above, found = [], 0
    for seed in range(60):
        sums = AnswerSums.of(*answers(seed, 10, grid, 0 * grid), 5)
        estimate = estimate_hypervolume(sums, -1.0, seed)
        above.append(estimate.above_chance)
        found += estimate.p_value <= 0.05
        assert estimate.low <= estimate.corrected <= estimate.high
        assert estimate.corrected < estimate.value
    assert abs(np.mean(above)) < 4 * np.std(above) / 60**0.5
    assert found <= 9  # of 60 at 5 %: more than 9 in one case of 1,500
    estimate = estimate_hypervolume(AnswerSums.of(*answers(0, 20, grid, 2 * grid), 5), -1.0)
    assert estimate.p_value < 0.05
    assert estimate.above_chance > 0.5


def test_the_correction_of_the_hypervolume_is_the_bootstraps_bias() -> None:
    """By a slow loop over the same resamples."""
    grid = evaluation_grid(2, 5).double()
    scores, index, positions = answers(3, 8, grid, grid)
    sums = AnswerSums.of(scores, index, positions, 5)
    drawn = []
    for chosen in generator(RandomStream.BOOTSTRAP, 5).integers(8, size=(1000, 8)):
        rows = torch.cat([torch.arange(40).view(8, 5)[p] for p in chosen])
        means = torch.stack([scores[rows][index[rows] == i].mean(0) for i in range(5)])
        drawn.append(float(hypervolume(means, -1.0)))
    estimate = estimate_hypervolume(sums, -1.0, 5)
    assert estimate.value == hypervolume(torch.stack([scores[index == i].mean(0) for i in range(5)]), -1.0)
    assert estimate.corrected == pytest.approx(2 * estimate.value - np.mean(drawn))
    assert estimate.high == pytest.approx(2 * estimate.value - np.quantile(drawn, 0.025))
    assert estimate.low == pytest.approx(2 * estimate.value - np.quantile(drawn, 0.975))
    assert estimate_hypervolume(sums, -1.0) == estimate_hypervolume(sums, -1.0, 0) != estimate
    one = estimate_hypervolume(AnswerSums.of(scores[:5], index[:5], positions[:5], 5), -1.0)
    assert all(np.isnan(getattr(one, f)) for f in ("above_chance", "p_value", "corrected", "low", "high"))
    assert one.value > 0


def test_what_chance_gives_is_that_of_a_slow_loop() -> None:
    """The preferences of every prompt in another order, 400 times; a value that is reached counts."""
    grid = evaluation_grid(2, 3).double()
    scores, index, positions = answers(4, 6, grid, grid)
    sums = AnswerSums.of(scores, index, positions, 3)
    chance = []
    for order in generator(RandomStream.BOOTSTRAP, 5, 1).random((400, 6, 3)).argsort(-1):
        rows = np.array([scores.view(6, 3, 2)[p].numpy()[order[p]] for p in range(6)])  # (P, M, K)
        chance.append(float(hypervolume(torch.tensor(rows.mean(0)), -1.0)))
    estimate = estimate_hypervolume(sums, -1.0, 5)
    assert estimate.above_chance == pytest.approx(estimate.value - np.mean(chance))
    assert estimate.p_value == (1 + sum(value >= estimate.value - 1e-12 for value in chance)) / 401
    none = AnswerSums.of(torch.zeros(6, 2), index[:6], positions[:6], 3)  # all alike: chance gives as much, always
    assert estimate_hypervolume(none, -1.0).p_value == 1


def test_sums_of_answers_by_hand() -> None:
    """Two prompts, three vectors, two answers under one of them; an answer without a score does not count."""
    scores = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, -1.0], [torch.nan, 7.0]])
    sums = AnswerSums.of(scores, torch.tensor([0, 0, 2, 1]), torch.tensor([8, 8, 8, 3]), 3)
    assert sums.count.tolist() == [[0, 0, 0], [2, 0, 1]]
    assert sums.total[1].tolist() == [[4, 7], [0, 0], [0, -1]]
    assert sums.outer[1, 0].tolist() == [[10, 17], [17, 29]]
    means, covariances = sums.moments()
    assert means[[0, 2]].tolist() == [[2, 3.5], [0, -1]]
    assert covariances[0].tolist() == [[2, 3], [3, 4.5]]
    assert means[1].isnan().all()
    assert covariances[1:].isnan().all()  # one answer has no covariance
    assert {x.dtype for x in (sums.count, sums.total, sums.outer)} == {torch.float64}
    none = AnswerSums.of(scores[:0], torch.zeros(0, dtype=torch.long), torch.zeros(0), 3)
    assert none.count.shape == (0, 3)


def test_resampled_moments_are_those_of_whole_prompts() -> None:
    grid = evaluation_grid(2, 3).double()
    scores, index, positions = answers(2, 4, grid, grid, repeat=2)
    means, covariances = resampled_moments(AnswerSums.of(scores, index, positions, 3), 20, 7)
    assert means.shape == (20, 3, 2)
    for d, chosen in enumerate(generator(RandomStream.BOOTSTRAP, 7).integers(4, size=(20, 4))):
        for m in range(3):
            rows = torch.cat([scores[(positions == p) & (index == m)] for p in chosen]).numpy()
            np.testing.assert_allclose(means[d, m], rows.mean(0))
            np.testing.assert_allclose(covariances[d, m], np.cov(rows.T))
    assert len(resampled_moments(AnswerSums.of(scores, index, positions, 3))[0]) == 1000
    assert len(permuted_means(AnswerSums.of(scores, index, positions, 3))) == 400


def test_an_interval_of_two_prompts_has_one_degree_of_freedom() -> None:
    mean, low, high = t_interval(torch.tensor([[1.0], [3.0]]))
    assert mean == 2
    assert (high - mean).item() == pytest.approx(stats.t.ppf(0.975, 1))  # times sd / sqrt(2), which is 1
    assert (mean - low).item() == pytest.approx(stats.t.ppf(0.975, 1))


def test_two_vectors_have_a_rank_correlation() -> None:
    found = rank_correlation(torch.tensor([[2.0, 0.0], [1.0, 5.0]]), torch.eye(2))
    assert found.tolist() == pytest.approx([1.0, 1.0])
    assert found.dtype == torch.float64


def test_the_metrics_figures_by_hand() -> None:
    """Two prompts under three vectors: of the first reward 0, 1, 5 and 2, 1, 7 from weight 0 to weight 1."""
    grid = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    first = torch.tensor([0.0, 1.0, 5.0, 2.0, 1.0, 7.0])
    scores, index = torch.stack([first, -first], 1), torch.tensor([0, 1, 2, 0, 1, 2])
    positions = torch.tensor([0, 0, 0, 1, 1, 1])
    metric = SteerabilityMetric(grid)
    metric.update(scores, index, positions)
    found = metric.compute()
    assert set(found) == {"slope", "low", "high", "rank"}
    torch.testing.assert_close(found["slope"], torch.tensor([[5.0, -5.0], [-5.0, 5.0]], dtype=torch.float64))
    assert found["low"].isnan().any() == found["high"].isnan().any() == False  # noqa: E712
    assert found["rank"].tolist() == pytest.approx([3**0.5 / 2] * 2)  # means 1, 1, 6: a tie is no rise
    front = ParetoFrontMetric(grid, reference_point=-2.0)
    front.update(scores, index, positions)
    figures = front.compute()
    means = torch.tensor([[1.0, -1.0], [1.0, -1.0], [6.0, -6.0]])
    level, covariance = mip_parts(grid, means)
    estimate = estimate_hypervolume(AnswerSums.of(scores, index, positions, 3), -2.0)
    expected = {
        "hv": hypervolume(means, -2.0), "mip": level + covariance, "mip_level": level, "mip_covariance": covariance,
        "crd": 0.0, "left_out": 0, "hv_above_chance": estimate.above_chance, "hv_p": estimate.p_value,
        "hv_corrected": estimate.corrected, "hv_corrected_low": estimate.low, "hv_corrected_high": estimate.high,
    }  # fmt: skip
    assert set(figures) == {*expected, "sd", "means"}
    for key, value in expected.items():
        assert float(figures[key]) == pytest.approx(float(value), abs=1e-6), key
        assert figures[key].dtype == torch.float64


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.7, 0.2, 1.2), "x follows its weight"),
        ((0.5, 0.0, 1.0), "x: no evidence that it follows its weight"),
        ((-0.5, -1.0, 0.0), "x: no evidence that it follows its weight"),
        ((-0.5, -0.9, -0.1), "x goes against its weight"),
    ],
)
def test_words_at_the_edge(numbers: tuple[float, float, float], said: str) -> None:
    assert follows("x", *numbers).startswith(said)


def test_what_is_drawn_by_default() -> None:
    grid = evaluation_grid(2, 3)
    sums = AnswerSums.of(*answers(1, 4, grid, grid.double()), 3)
    assert torch.equal(permuted_means(sums), permuted_means(sums, seed=0))
    assert not torch.equal(permuted_means(sums), permuted_means(sums, seed=1))
    assert torch.equal(resampled_moments(sums)[0], resampled_moments(sums, seed=0)[0])
    assert not torch.equal(resampled_moments(sums)[0], resampled_moments(sums, seed=1)[0])


def test_permuted_means_of_one_answer_each() -> None:
    grid = torch.eye(2)
    sums = AnswerSums.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    permuted = permuted_means(sums)
    assert permuted.shape[1:] == grid.shape
    assert sorted(map(tuple, permuted[0].tolist())) == [(1.0, 2.0), (3.0, 4.0)]
