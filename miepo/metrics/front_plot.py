"""The measured front of a policy: what was reached under which preference, as a picture and as a table."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import combinations, cycle
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Front:
    """Mean rewards under the preference vectors of an evaluation; renders in a notebook.

    Attributes:
        names: Of the ``K`` objectives.
        grid: ``(M, K)`` preference vectors.
        means: ``(M, K)`` mean normalised rewards under each.
        before: ``(M, K)`` the same before training, where it was measured.
    """

    names: tuple[str, ...]
    grid: Tensor
    means: Tensor
    before: Tensor | None = None

    def nearest(self, preference: Tensor) -> int:
        """Return the index of the vector of the grid that is nearest to a preference ``(K,)``."""
        return int((self.grid - preference).norm(dim=-1).argmin())

    def draw(self, marks: Mapping[str, Sequence[float]] | None = None) -> Any:
        """Draw a matplotlib figure; ``marks`` are points ``(K,)`` to point out, by their labels."""
        before = None if self.before is None else self.before.tolist()
        return draw_front(self.grid, self.means, self.names, before, "measured", marks)

    def _repr_html_(self) -> str:
        buffer = BytesIO()
        self.draw().savefig(buffer, format="png", dpi=100)
        picture = base64.b64encode(buffer.getvalue()).decode()
        head = "".join(f"<th>{escape(text)}</th>" for text in [*(f"weight of {n}" for n in self.names), *self.names])
        rows = [
            "<tr>" + "".join(f"<td>{x:.3f}</td>" for x in [*w, *s]) + "</tr>"
            for w, s in zip(self.grid.tolist(), self.means.tolist(), strict=True)
        ]
        return (
            f'<img alt="Pareto front" src="data:image/png;base64,{picture}" style="max-width: 100%">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


def draw_front(
    grid: Tensor,
    means: Tensor,
    names: Sequence[str],
    before: Sequence[Sequence[float]] | None,
    label: str,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> Any:
    """Draw a matplotlib figure of the front: a projection on each pair of objectives, and, of three, a view in space.

    Args:
        grid: ``(M, K)`` preference vectors; the colour of a point is the weight of the panel's horizontal objective, in
            space a mixture of red, green and blue by weight.
        means: ``(M, K)`` mean reward vectors.
        names: Of the objectives.
        before: An earlier front to compare with, ``(M, K)``.
        label: What the front is of.
        marks: Points ``(K,)`` to point out, by their labels.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    names = [name.replace("$", r"\$") for name in names]  # or matplotlib reads mathematics
    pairs = list(combinations(range(len(names)), 2)) or [(0, 0)]
    in_space = len(names) == 3
    across = 2 if in_space else min(len(pairs), 3)
    down = -(-(len(pairs) + in_space) // across)
    figure = Figure(figsize=(5.2 * across, 4.6 * down), layout="constrained")
    for panel, (i, j) in enumerate(pairs, 1):
        axis = figure.add_subplot(down, across, panel)
        if before is not None:
            axis.plot(*zip(*[(row[i], row[j]) for row in before], strict=True), "o", color="0.6", ms=5, label="before")
        if len(names) == 2:
            axis.plot(means[:, i], means[:, j], "-", color="0.8", zorder=0)
        points = axis.scatter(
            means[:, i], means[:, j], c=grid[:, i], cmap="viridis", vmin=0, vmax=1, label=label, zorder=2
        )
        for (title, point), form in zip((marks or {}).items(), cycle("*XPD")):
            axis.plot(point[i], point[j], form, ms=14, mec="black", mew=1.2, label=title, zorder=3)
        figure.colorbar(points, ax=axis, label=f"weight of {names[i]}")
        axis.set(xlabel=f"{names[i]} (normalised)", ylabel=f"{names[j]} (normalised)")
        axis.grid(alpha=0.3)
        axis.legend(loc="best", markerscale=0.6 if marks else 1.0, fontsize="small" if marks else None)
    if in_space:
        axis = figure.add_subplot(down, across, len(pairs) + 1, projection="3d")
        if before is not None:
            axis.plot(*zip(*before, strict=True), "o", color="0.7", ms=4, label="before")
        axis.scatter(*means.T, c=grid.clamp(0, 1).numpy(), s=40, depthshade=False, label=label)  # type: ignore[misc]
        axis.set(xlabel=names[0], ylabel=names[1], zlabel=names[2])
        axis.legend(loc="best")
    return figure
