from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from miepo.errors import UserError
from miepo.preferences import (
    CornerPreferences,
    DirichletPreferences,
    PreferenceSampler,
    draw_preferences,
    evaluation_grid,
    format_preference,
    parse_preference,
    simplex_rows,
)
from miepo.seeding import RandomStream, generator, torch_seed, torch_seeds
from tools.study.exploration import FartherPreferences


@pytest.mark.parametrize(
    "sampler",
    [s for s in PreferenceSampler.__subclasses__() if s is not FartherPreferences],  # which are no independent draws
)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_contract_samplers_draw_from_the_simplex_with_equal_means(sampler: type[PreferenceSampler], k: int) -> None:
    drawn = sampler().draw(generator(RandomStream.PREFERENCE, 0), 4000, k)
    assert drawn.shape == (4000, k)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(drawn.mean(0), 1 / k, atol=0.04)


def test_dirichlet_has_its_variance() -> None:
    # Var w_k = (1/K)(1 - 1/K) / (K alpha + 1)
    drawn = DirichletPreferences(0.5).draw(generator(RandomStream.PREFERENCE, 1), 20_000, 2)
    assert drawn[:, 0].var() == pytest.approx(0.25 / 2, rel=0.03)


def test_draws_depend_on_the_place_in_the_run_and_not_on_the_batch() -> None:
    whole = draw_preferences(DirichletPreferences(), 7, [0] * 6, range(6), 3, 2)
    parts = [draw_preferences(DirichletPreferences(), 7, [0] * 2, [i, i + 1], 3, 2) for i in (0, 2, 4)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts]))
    assert torch.equal(whole[1], torch.cat([p[1] for p in parts]))
    assert whole[1].shape == (6, 3, 2)
    rows = torch.cat([whole[0].unsqueeze(1), whole[1]], 1).flatten(0, 1)
    assert len(rows.unique(dim=0)) == 24  # w+ and every w- are draws of their own
    for other in ((8, 0), (7, 1)):
        again = draw_preferences(DirichletPreferences(), other[0], [other[1]] * 6, range(6), 3, 2)
        assert not torch.equal(whole[0], again[0])


def test_draws_are_those_of_their_own_stream() -> None:
    sampler = DirichletPreferences(0.5)
    plus, minus = draw_preferences(sampler, 7, [0, 2], [4, 4], 2, 3)
    for row, epoch in enumerate((0, 2)):
        drawn = sampler.draw(generator(RandomStream.PREFERENCE, 7, epoch, 4), 3, 3)
        np.testing.assert_allclose(torch.cat([plus[row : row + 1], minus[row]]), drawn, rtol=1e-6)
    with pytest.raises(ValueError, match="longer"):
        draw_preferences(sampler, 7, [0], [4, 5], 2, 3)


def test_w_plus_does_not_depend_on_the_number_of_counterfactuals() -> None:
    args = (DirichletPreferences(), 7, [0] * 3, range(3))
    assert torch.equal(draw_preferences(*args, 0, 2)[0], draw_preferences(*args, 4, 2)[0])


def test_a_far_w_minus_of_the_study_is_the_farthest_of_its_candidates() -> None:
    args = 7, [0] * 50, range(50)
    plus, every = draw_preferences(DirichletPreferences(), *args, 6, 2)  # the same draws, as six w-
    again, far = draw_preferences(FartherPreferences(3), *args, 2, 2)  # two w-, each of three candidates
    assert torch.equal(plus, again)
    assert far.shape == (50, 2, 2)
    distance = (every - plus.unsqueeze(1)).abs().sum(-1).view(50, 2, 3)
    torch.testing.assert_close((far - plus.unsqueeze(1)).abs().sum(-1), distance.amax(-1))
    assert draw_preferences(FartherPreferences(), *args, 0, 2)[1].shape == (50, 0, 2)


@pytest.mark.parametrize(("k", "points", "m"), [(1, None, 1), (2, None, 11), (2, 5, 5), (3, None, 13), (3, 15, 15), (3, 14, 10), (4, None, 11), (4, 4, 4)])  # fmt: skip
def test_grids(k: int, points: int | None, m: int) -> None:
    grid = evaluation_grid(k, points)
    assert grid.shape == (m, k)
    assert (grid >= 0).all()
    torch.testing.assert_close(grid.sum(1), torch.ones(m))
    assert len(grid.unique(dim=0)) == m
    for corner in torch.eye(k):
        assert (grid == corner).all(1).any()


def test_preference_by_name() -> None:
    assert parse_preference({"b": 0.25, "a": 0.75}, ["a", "b", "c"]).tolist() == [0.75, 0.25, 0.0]


def test_weights_are_normalised_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="sum to 4, not 1"):
        assert parse_preference({"a": 1, "b": 3}, ["a", "b"]).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0}, "preference: unknown objective c; the objectives are a, b"),
        ({"a": -0.5, "b": 1.5}, "weight of a must not be negative, got -0.5"),
        ({"a": 0.0, "b": 0.0}, "at least one weight must be positive"),
        ({}, "at least one weight must be positive"),
        ({"a": float("nan")}, "must be a number, got nan"),
        ({"a": 1e10}, "must be a number, got 10000000000.0"),
        ({"a": -1e10}, "must be a number, got -10000000000.0"),
        ({"a": True}, "must be a number, got True"),
        ({"a": "much"}, "must be a number, got 'much'"),
        ({"a": "x" * 78}, f"must be a number, got '{'x' * 78}'$"),  # 80 characters with its quotes
        ({"a": "x" * 79}, f"must be a number, got '{'x' * 79}[.][.]$"),
        ({"a": 10**5000}, "must be a number, got a number of very many digits$"),
    ],
)
def test_bad_preferences(weights: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_preference(weights, ["a", "b"])


@pytest.mark.parametrize("total", [0.998, 1.002, 3.0])
def test_a_sum_that_is_not_one_is_refused_where_asked(total: float) -> None:
    with pytest.raises(UserError, match=f"request: expected weights that sum to 1, got a sum of {total:g}"):
        parse_preference({"a": total}, ["a", "b"], "request", strict=True)


@pytest.mark.parametrize("total", [0.9995, 1.0005])
def test_rounding_of_a_sum_is_normalised_without_a_word_where_asked(total: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict = parse_preference({"a": total / 2, "b": total / 2}, ["a", "b"], strict=True)
    assert strict.tolist() == [0.5, 0.5]
    with pytest.warns(UserWarning, match="they are normalised"):
        parse_preference({"a": total}, ["a", "b"])


def test_a_zero_has_no_minus() -> None:
    assert str(parse_preference({"a": -0.0, "b": 1.0}, ["a", "b"]).tolist()) == "[0.0, 1.0]"


def test_a_preference_for_people() -> None:
    assert format_preference(torch.tensor([0.25, 0.754]), ["cheerful", "brief"]) == "cheerful 0.25, brief 0.75"
    with pytest.raises(ValueError, match="shorter"):
        format_preference(torch.ones(1), ["cheerful", "brief"])


def test_rows_of_a_grid() -> None:
    with pytest.warns(UserWarning, match="data.grid: the weights sum to 4, not 1"):
        rows = simplex_rows([[1.0, 0.0, 0.0], (1, 3, 0)], 3, "data.grid")
    torch.testing.assert_close(rows, torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]))
    assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 0.0], [1.0]], "data.grid: a preference vector needs 2 weights, got .1.0.$"),
        ([], "data.grid: expected at least one preference vector, got none"),
        ([0.5], "data.grid: a preference vector is a list of 2 weights, got 0.5"),
        ([[0.5, -1.0]], "data.grid: the weight of 1 must not be negative, got -1.0"),
    ],
)
def test_bad_grid_row(rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        simplex_rows(rows, 2, "data.grid")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), [1.0, 0.0], []])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(UserError, match="must be positive"):
        DirichletPreferences(alpha)


def test_alpha_of_another_length() -> None:
    with pytest.raises(UserError, match="has 3 entries, but there are 2 objectives"):
        DirichletPreferences([1.0, 1.0, 1.0]).draw(generator(RandomStream.PREFERENCE, 0), 1, 2)


def test_corners_are_one_hot() -> None:
    drawn = CornerPreferences().draw(generator(RandomStream.PREFERENCE, 0), 50, 3)
    assert set(map(tuple, drawn)) == set(map(tuple, np.eye(3)))


def test_seeds_for_torch_are_draws_of_numpy() -> None:
    wanted = [
        int(np.random.default_rng([RandomStream.SAMPLING, 3, *place]).integers(2**63)) for place in ((0, 7), (1, 2))
    ]
    assert torch_seeds(RandomStream.SAMPLING, 3, [0, 1], [7, 2]) == wanted
    assert torch_seed(RandomStream.SAMPLING, 3, 0, 7) == wanted[0]


def test_grids_of_as_many_points_as_there_are() -> None:
    assert [len(evaluation_grid(3, n)) for n in (3, 5, 6, 9, 10)] == [3, 3, 6, 6, 10]
    assert evaluation_grid(3, 6).unique().tolist() == [0.0, 0.5, 1.0]
    assert evaluation_grid(2)[3, 0] == torch.tensor(0.3)
    assert DirichletPreferences().alpha == 1.0
