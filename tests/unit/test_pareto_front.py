"""The picture of the front."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miepo.callbacks.pareto_front import draw_front
from miepo.preferences import evaluation_grid


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_pair_is_projected_and_three_are_shown_in_space(k: int) -> None:
    grid = evaluation_grid(k, None if k < 4 else 9)
    means = torch.rand(len(grid), k)
    figure = draw_front(grid, means, [f"o{i}" for i in range(k)], (means - 1).tolist(), "after")
    flat = [a for a in figure.axes if a.get_xlabel() and not hasattr(a, "get_zlabel")]
    space = [a for a in figure.axes if hasattr(a, "get_zlabel")]
    pairs = [(f"o{i}", f"o{j}") for i in range(k) for j in range(i + 1, k)]
    assert [tuple(label.split()[0] for label in (a.get_xlabel(), a.get_ylabel())) for a in flat] == pairs
    drawn = flat[0].collections[0].get_offsets().data
    np.testing.assert_allclose(drawn, means[:, :2].numpy(), rtol=1e-6)
    assert len(space) == (k == 3)
    if k == 3:
        x, y, z = space[0].collections[0]._offsets3d
        np.testing.assert_allclose(np.stack([x, y, z], 1), means.numpy(), rtol=1e-6)
    figure.savefig("/dev/null", format="png")
