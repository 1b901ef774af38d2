"""How often the intervals of an evaluation have the truth: simulated evaluations whose true figures are known.

``python -m tools.interval_coverage`` prints a table for each size of the evaluation: fronts of several shapes, the mean
of the estimates of HV beside the truth, and the share of 95 % intervals that have it. What it printed is in
``tools/interval_coverage.md``.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from math import inf, pi

import numpy as np
import torch
from torch import Tensor

from miepo.evaluation import Answers
from miepo.metrics import estimate_hypervolume, hypervolume, mean_inner_product, preference_slopes, t_interval
from miepo.metrics.resampling import AnswerSums
from miepo.preferences import evaluation_grid
from miepo.report.intervals import front_of

REFERENCE_POINT = -1.0
PROMPT_SD, RESPONSE_SD = 0.6, 0.8  # of what all answers to a prompt share, and of each; together a variance of 1


def fronts(grid: Tensor) -> dict[str, Tensor]:
    """Return mean reward vectors ``(M, 2)`` of policies that obey in different ways, and of two that do not."""
    first = grid[:, 0]
    return {
        "flat: the policy ignores w": torch.zeros_like(grid),
        "collapsed: one answer for all w": torch.tensor([1.5, -0.5], dtype=torch.float64).expand_as(grid),
        "weak": 0.6 * grid,
        "linear": 2 * grid,
        "concave": 2 * torch.stack([(first * pi / 2).sin(), (first * pi / 2).cos()], 1),
        "convex": 2 * grid**2,
        "one objective follows": torch.stack([2 * first, torch.zeros_like(first)], 1),
    }


def simulated(means: Tensor, prompts: int, seed: int) -> Answers:
    """Return one answer to each of so many prompts under each preference vector."""
    m, rng = len(means), np.random.default_rng([11, seed, prompts, len(means)])
    shared = rng.normal(size=(prompts, 1, 2)) * PROMPT_SD
    scores = means.numpy() + shared + rng.normal(size=(prompts, m, 2)) * RESPONSE_SD
    return Answers(
        ("a", "b"), evaluation_grid(2, m).double(), torch.arange(m).repeat(prompts),
        torch.arange(prompts).repeat_interleave(m), torch.tensor(scores).flatten(0, 1), (), (),
    )  # fmt: skip


def row(name: str, means: Tensor, prompts: int, simulations: int) -> str:
    """Return a line of the table."""
    grid = evaluation_grid(2, len(means)).double()
    truth = float(hypervolume(means, REFERENCE_POINT))
    known = {"mip": float(mean_inner_product(grid, means)), "crd": 1.0}
    slope = preference_slopes(means, torch.arange(len(means)), torch.zeros(len(means)), grid)[0, 0, 0].nan_to_num()
    found, hits = [], np.zeros(5)
    for seed in range(simulations):
        e = simulated(means, prompts, seed)
        sums = AnswerSums.of(e.scores, e.grid_index, e.positions, len(grid))
        hv = estimate_hypervolume(sums, REFERENCE_POINT)
        found.append([hv.value, hv.corrected, hv.above_chance, hv.p_value <= 0.05])
        front = front_of(e, REFERENCE_POINT, draws=1)
        _, under, over = (x[0, 0] for x in t_interval(preference_slopes(e.scores, e.grid_index, e.positions, grid)))
        percentile = 2 * hv.value - hv.high <= truth <= 2 * hv.value - hv.low
        within = [front.get(f"front/{k}_low", inf) <= true <= front[f"front/{k}_high"] for k, true in known.items()]
        hits += [percentile, hv.low <= truth <= hv.high, under <= slope <= over, *within]
    value, corrected, above, clear = np.mean(found, 0)
    shares = " | ".join(f"{share:.0%}" for share in hits / simulations)
    return f"| {name} | {truth:.2f} | {value:.2f} | {corrected:.2f} | {above:+.2f} | {clear:.0%} | {shares} |"


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.interval_coverage", description=__doc__)
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 20, 64])
    parser.add_argument("--vectors", type=int, nargs="+", default=[5, 11])
    options = parser.parse_args(arguments)
    for vectors in options.vectors:
        for prompts in options.prompts:
            print(
                f"{prompts} prompts x {vectors} vectors, {options.simulations} simulations\n\n"
                "| front | true HV | plug-in | corrected | above chance | p <= .05 | plug-in, percentile interval | "
                f"corrected, basic interval | slope, t interval | MIP, jackknife | CRD, jackknife |\n{'|---' * 11}|"
            )
            for name, means in fronts(evaluation_grid(2, vectors).double()).items():
                print(row(name, means, prompts, options.simulations), flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
