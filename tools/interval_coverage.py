"""How often the bootstrap intervals of a report have the truth: simulated evaluations whose true figures are known.

``python -m tools.interval_coverage`` takes about six minutes; the README's "Reports" has what it printed.
"""

from __future__ import annotations

import numpy as np
import torch

from miepo.metrics import hypervolume, mean_inner_product
from miepo.preferences import evaluation_grid
from miepo.report.intervals import bootstrap
from miepo.report.runs import Evaluation

SIMULATIONS, REFERENCE_POINT = 400, -1.0
PROMPT_SD, RESPONSE_SD = 0.6, 0.8  # of what all answers to a prompt share, and of each; together a variance of 1


def main() -> None:
    grid = evaluation_grid(2, 5).double()  # (M, K)
    means = 2 * grid
    truth = [float(hypervolume(means, REFERENCE_POINT)), float(mean_inner_product(grid, means)), 1.0]
    for prompts in (10, 40, 100):
        hits = np.zeros(3)
        for simulation in range(SIMULATIONS):
            rng = np.random.default_rng([11, simulation, prompts])
            shared = rng.normal(size=(prompts, 1, 2)) * PROMPT_SD
            scores = means.numpy() + shared + rng.normal(size=(prompts, len(grid), 2)) * RESPONSE_SD
            evaluation = Evaluation(
                "", 1, ("a", "b"), grid, torch.arange(len(grid)).repeat(prompts),
                torch.arange(prompts).repeat_interleave(len(grid)), torch.tensor(scores).flatten(0, 1), (), (),
            )  # fmt: skip
            low, high = np.nanquantile(bootstrap(evaluation, REFERENCE_POINT), [0.025, 0.975], axis=0)
            hits += (low <= truth) & (truth <= high)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(("HV", "MIP", "CRD"), hits / SIMULATIONS, strict=False)
        )
        print(f"{prompts} prompts: {shares}")


if __name__ == "__main__":
    main()
