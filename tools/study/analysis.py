"""From the runs of a study to a tidy table, means with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import moocore
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from miepo.errors import UserError
from miepo.metrics import hypervolume, t_interval
from miepo.metrics.resampling import jackknife_interval
from tools.study.rows import Rows
from tools.study.study import METRICS, Study

CLEAR_SEEDS = 3  # of fewer seeds no interval is called clear of zero
BUDGET = ("scored_responses", "step")  # what two runs must have in common to be compared


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t interval; none is invented for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        if self.low is None or self.high is None or self.seeds < CLEAR_SEEDS:
            return False
        alike = self.low == self.high  # by chance, as shares of a few answers may be: no width tells of no spread
        return not alike and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed; NaN does not count."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers) == 0:
        return Estimate(float("nan"), None, None, 0)
    if len(numbers) == 1:
        return Estimate(float(numbers[0]), None, None, 1)
    mean, low, high = map(float, t_interval(torch.from_numpy(numbers)))
    return Estimate(mean, low, high, len(numbers))


def tidy(found: Rows) -> pd.DataFrame:
    """Make a table of all rows, without the front, the grid and the objectives' names."""
    dropped = ("front", "grid", "names")
    table = pd.DataFrame(
        {key: value for key, value in row.items() if key not in dropped} for rows in found.values() for row in rows
    )
    if slopes := [column for column in table.columns if column.startswith("slope/")]:
        table["median_slope"] = table[slopes].median(axis=1)
    return table


def final(table: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluation of every run.

    Raises:
        UserError: two runs had different budgets, so that a difference between them would say nothing.
    """
    last = table.sort_values(["seed", "step"], kind="stable").groupby(["method", "seed"], sort=False).tail(1)
    for key in BUDGET:
        budgets = last.groupby(key)["method"].first()
        if len(budgets) > 1:
            both = "; ".join(f"{method} has {int(value)}" for value, method in budgets.items())
            raise UserError(f"expected runs of one budget, got different {key.replace('_', ' ')}s: {both}")
    return last


def columns(study: Study, table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Map columns of the table to (title, better when), as the study's ``metrics`` ask."""
    result = {}
    for name in study.metrics:
        key, title, better = METRICS[name]
        if key.endswith("*"):
            for column in table.columns:
                if column.startswith(key[:-1]):
                    result[column] = (f"{title} of {column.removeprefix(key[:-1])}", better)
        elif key in table.columns:
            result[key] = (title, better)
    return result


def summary(study: Study, last: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Return the mean over seeds of every metric of every method that has a finished run."""
    return {
        name: {column: estimate(last.loc[last.method == name, column]) for column in columns(study, last)}
        for name in study.methods
        if (last.method == name).any()
    }


def pairs(last: pd.DataFrame, method: str, other: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the runs of two methods that share a seed and a precision, in one order."""
    keys = [key for key in ("seed", "precision") if key in last]
    a, b = (last[last.method == name].set_index(keys).sort_index() for name in (method, other))
    both = a.index.intersection(b.index)
    return a.loc[both], b.loc[both]


def paired(study: Study, last: pd.DataFrame, method: str, other: str) -> dict[str, Estimate]:
    """Return the mean difference ``method - other`` over the seeds that both have in the same precision."""
    a, b = pairs(last, method, other)
    return {column: estimate(a[column] - b[column]) for column in columns(study, last)}


def relative(last: pd.DataFrame, method: str, other: str, column: str, ceiling: float = 0.0) -> Estimate:
    """Compare the means over seeds: ``(method - other) / |ceiling - other|``, with a jackknife t interval over seeds.

    With ``ceiling`` 0 it is the relative change; with what the true front has, the share of the gap that is closed.
    There is no interval where the denominator changes its sign with a seed, so that the ratio is of no size.
    """
    x, y = (torch.tensor(part[column].to_numpy(float)) for part in pairs(last, method, other))
    known = x.isfinite() & y.isfinite()
    x, y, n = x[known], y[known], int(known.sum())
    if n == 0 or y.mean() == ceiling:
        return Estimate(float("nan"), None, None, 0)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return (a - b) / (ceiling - b).abs()

    value, a, b = ratio(x.mean(), y.mean()), (x.sum() - x) / (n - 1), (y.sum() - y) / (n - 1)
    if n == 1 or len(torch.sign(ceiling - b).unique()) > 1:
        return Estimate(float(value), None, None, n)
    low, high = jackknife_interval(value, ratio(a, b))
    return Estimate(float(value), float(low), float(high), n)


def at_equal(
    study: Study, last: pd.DataFrame, methods: Sequence[str], given: str
) -> dict[str, tuple[Estimate, dict[str, Estimate]]]:
    """Compare methods at an equal value of ``given``, as if a run of each had moved as far as the baseline's.

    Every column is regressed on ``given``, the seed and the method, by least squares over the runs of ``methods``: one
    slope for all of them, and residuals that are alike and independent.

    Returns:
        By column: what a unit of ``given`` goes with, and the difference of each method to the baseline; 95 % t
        intervals. No column of which a value is missing, or which has too few runs for an interval.
    """
    others = [name for name in methods if name != study.baseline]
    runs = last[last.method.isin([study.baseline, *others])]
    seeds = sorted(runs.seed.unique())
    x = np.column_stack(
        [
            runs[given],
            *((runs.method == name).astype(float) for name in others),
            *((runs.seed == seed).astype(float) for seed in seeds),
        ]
    )  # (n, 1 + methods + seeds)
    result = {}
    if np.linalg.matrix_rank(x) < x.shape[1]:  # methods that share no seed, or runs that moved alike
        return {}
    for column in columns(study, last):
        y = runs[column].to_numpy(float)
        free = len(y) - x.shape[1]
        if column == given or free < 1 or not np.isfinite(y).all():
            continue
        inverse = np.linalg.inv(x.T @ x)
        value = inverse @ x.T @ y
        sd = np.sqrt(np.diag(inverse) * ((y - x @ value) ** 2).sum() / free)
        wide = stats.t.ppf(0.975, free) * sd
        found = [Estimate(v, v - h, v + h, len(seeds)) for v, h in zip(value.tolist(), wide.tolist(), strict=True)]
        result[column] = found[0], dict(zip(others, found[1:], strict=False))
    return result


def clear_slopes(last: pd.DataFrame, method: str) -> tuple[int, int]:
    """Return how many slopes of a method's runs are above 0 by their interval over prompts, and how many there are."""
    lows = last.loc[last.method == method, [c for c in last.columns if c.startswith("slope_low/")]].to_numpy(float)
    return int((lows > 0).sum()), lows.size


def hull_points(vertices: np.ndarray, steps: int = 2000) -> np.ndarray:
    """Return points on the segments between successive vertices of a concave front, ``(n, 2)``.

    Mean rewards of a policy that mixes two answers lie on the segment between theirs.
    """
    parts = [np.linspace(a, b, steps) for a, b in pairwise(vertices)]
    return np.concatenate(parts)


def true_hypervolume(vertices: np.ndarray, reference_point: float) -> float:
    """Return the hypervolume below a concave front given by its vertices ``(V, 2)``."""
    return float(hypervolume(torch.from_numpy(hull_points(vertices)), reference_point))


def true_mip(vertices: np.ndarray, grid: np.ndarray) -> float:
    """Return the largest MIP on a ``grid`` ``(M, K)`` of preferences: the mean over them of the best inner product."""
    return float((grid @ vertices.T).max(1).mean())


def grid_of(found: Rows) -> np.ndarray:
    """Return the preferences ``(M, K)`` that the runs of a study are evaluated under."""
    return np.array(next(iter(found.values()))[-1]["grid"])


def fronts(found: Rows, method: str) -> list[np.ndarray]:
    """Return the last front ``(M, K)`` of every finished run of a method, without vectors that were not measured."""
    last = [np.array(rows[-1]["front"]) for (name, _), rows in found.items() if name == method]
    return [front[np.isfinite(front).all(1)] for front in last]


def attainment(sets: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """Return empirical attainment surfaces for two objectives: what 25, 50 and 75 % of the runs reach (moocore).

    Args:
        sets: One front ``(M, 2)`` per run, higher is better.

    Returns:
        Percentage of the runs -> points of the surface ``(n, 2)``.
    """
    points, index = -np.concatenate(sets), np.repeat(np.arange(1, len(sets) + 1), [len(s) for s in sets])
    surfaces = moocore.eaf(points, index, percentiles=[25, 50, 75])  # moocore minimises
    return {p: -surfaces[surfaces[:, -1] == p][:, :-1] for p in (25, 50, 75)}


def work(last: pd.DataFrame) -> dict[str, Any]:
    """Return the budget that all runs of a study share."""
    return {key: int(last[key].iloc[0]) for key in BUDGET}
