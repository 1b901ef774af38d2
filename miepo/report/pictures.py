"""The pictures of a report, as matplotlib figures without pyplot: no display, no global state."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from io import BytesIO
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from miepo.evaluation import Answers, Evaluation
from miepo.metrics.front_plot import draw_front
from miepo.metrics.steerability import without_limits
from miepo.report.runs import RunRecord
from miepo.report.text import visible

# eight colours that remain apart for colour-blind readers (Okabe and Ito), the palest left out
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")
SMOOTHED = 100  # points from which a curve is drawn as a running mean over its values


def style(run: int) -> dict[str, Any]:
    """Return colour and line of the run of that number."""
    return {"color": COLOURS[run % len(COLOURS)], "ls": LINES[run // len(COLOURS) % len(LINES)]}


def plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return visible(text).replace("$", r"\$").replace("\n", " ")


def data_uri(figure: Figure) -> str:
    """Return the picture as SVG that an ``<img>`` takes; there it cannot run anything, nor share names with another."""
    file = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "miepo"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has fonts of its own
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def draw_curve(key: str, runs: Sequence[RunRecord]) -> Figure:
    """Draw one metric of all runs over steps; with its interval and its ceiling where they are logged."""
    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    axis = figure.subplots()
    for i, run in enumerate(runs):
        if key not in run.series:
            continue
        steps, values = np.array(run.series[key]).T
        line = style(i)
        few = len(steps) <= 20
        if len(steps) > SMOOTHED:
            axis.plot(steps, values, color=line["color"], lw=0.5, alpha=0.3)
            values = running_mean(values, len(values) // 50)
        axis.plot(steps, values, marker="o" if few else None, ms=3, lw=1.5, **line)
        low, high = (run.series.get(f"{key}_{end}") for end in ("low", "high"))
        if low and high and len(low) == len(high) == len(steps):
            axis.fill_between(steps, [v for _, v in low], [v for _, v in high], color=line["color"], alpha=0.15, lw=0)
        if key == "information/preference" and "information/ceiling" in run.series:
            axis.axhline(run.series["information/ceiling"][-1][1], color="0.6", lw=0.8, ls="--")
    axis.set(title=plain(key), xlabel="step")
    axis.title.set_fontsize(11)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean over ``width`` values around each, fewer at the ends.

    >>> running_mean(np.array([0.0, 3.0, 6.0]), 3)
    array([1.5, 3. , 4.5])
    """
    kernel = np.ones(max(width, 1))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def mean_rewards(answers: Answers) -> Tensor:
    """Return ``(M, K)``; a response that some objective gave no score does not count, as in the figures."""
    keep = answers.scores.isfinite().all(-1)
    rows, index = answers.scores[keep], answers.grid_index[keep]
    count = torch.bincount(index, minlength=len(answers.grid)).unsqueeze(-1)
    return torch.zeros(len(answers.grid), rows.shape[1]).double().index_add_(0, index, rows) / count


def front(evaluation: Evaluation | None) -> tuple[Tensor, Tensor] | None:
    """Return preference vectors and mean rewards ``(M, K)``: the measured ones, else those of the answers."""
    if evaluation is None:
        return None
    if evaluation.means is not None:
        return evaluation.grid, evaluation.means
    answers = evaluation.answers
    return None if answers is None else (answers.grid, mean_rewards(answers))


def draw_fronts(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draw the fronts before and after: a picture for each pair of objectives, all runs in it."""
    measured = [
        (i, run, run.latest.title, found) for i, run in enumerate(runs) if run.latest and (found := front(run.latest))
    ]
    if not measured:
        return []
    names = measured[0][1].names
    if len(runs) == 1 and len(names) == 2:
        _, run, title, (grid, after) = measured[0]
        old = front(run.first) if run.last else None
        before = old and old[1].tolist()
        return [draw_front(grid, after, [visible(n) for n in names], before, title)]
    figures = []
    for i, j in list(combinations(range(len(names)), 2)) or [(0, 0)]:
        figure = Figure(figsize=(4.6, 4.0), layout="constrained")
        axis = figure.subplots()
        for number, run, _, (grid, after) in measured:
            line = style(number)
            if run.last and (old := front(run.first)):
                colour = "0.5" if len(runs) == 1 else line["color"]
                axis.plot(old[1][:, i], old[1][:, j], "o", ms=4.5, mfc="none", color=colour, alpha=0.8)
            if len(runs) == 1:  # colour is free for the preference
                points = axis.scatter(after[:, i], after[:, j], c=grid[:, i], vmin=0, vmax=1, zorder=2)
                figure.colorbar(points, ax=axis, label=f"weight of {plain(names[i])}")
            else:
                axis.plot(after[:, i], after[:, j], "o", ms=6, color=line["color"])
            if len(names) == 2:
                axis.plot(after[:, i], after[:, j], lw=1, alpha=0.5, zorder=0, **line)
        axis.set(xlabel=f"{plain(names[i])} (normalised)", ylabel=f"{plain(names[j])} (normalised)")
        axis.grid(alpha=0.3)
        figures.append(figure)
    return figures


def draw_rewards(run: RunRecord, objective: int) -> Figure:
    """Draw boxes of one objective's rewards under each preference vector, before beside after.

    The vectors stand in the order of this objective's weight.
    """
    latest = run.answers
    assert latest is not None
    order = latest.grid[:, objective].argsort(stable=True).tolist()
    m = len(order)
    figure = Figure(figsize=(max(4.2, 1.6 + 0.42 * m), 3.2), layout="constrained")
    axis = figure.subplots()
    pair = [run.first.answers, latest] if run.last and run.first and run.first.answers else [latest]
    for number, answers in enumerate(pair):
        newest = answers is latest
        rows = reward_columns(answers, latest.grid, objective)
        shift = 0.0 if len(pair) == 1 else (number - 0.5) * 0.4
        lines = {"color": "0.3" if newest else "0.6"}
        boxes = axis.boxplot(
            [rows[i] for i in order],
            whis=(0, 100),  # all of them
            positions=[x + shift for x in range(m)],
            widths=0.34,
            patch_artist=True,
            manage_ticks=False,
            medianprops={"color": "black" if newest else "0.4"},
            flierprops={"marker": ".", "ms": 3, "mec": "0.5"},
            boxprops={**lines},  # matplotlib changes it
            whiskerprops=lines,
            capprops=lines,
        )
        for i, box in zip(order, boxes["boxes"], strict=True):
            weight = float(latest.grid[i, objective])
            box.set_facecolor(matplotlib.colormaps["viridis"](weight) if newest else "0.9")
            box.set_alpha(0.75)
    axis.set_xticks(range(m), [f"{float(latest.grid[i, objective]):.2f}" for i in order], rotation=90 if m > 7 else 0)
    name = plain(latest.names[objective])
    axis.set(xlabel=f"weight of {name}", ylabel=f"{name} (normalised)")
    axis.grid(alpha=0.3, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def reward_columns(answers: Answers, grid: Tensor, objective: int) -> list[np.ndarray]:
    """Return the finite rewards under each vector of ``grid``, found by its weights."""
    scores = answers.scores[:, objective]
    found = []
    for vector in grid:
        same = (answers.grid - vector).abs().amax(-1) < 1e-5  # (M,)
        rows = scores[same[answers.grid_index]]
        found.append(rows[rows.isfinite()].numpy())
    return found


def curves(runs: Sequence[RunRecord]) -> tuple[list[str], list[str], list[str]]:
    """Return which metrics have a curve: the main ones, the others, and those that are 0 throughout, which have none.

    A metric with fewer than two points has none, nor the limits and the ceiling that are drawn with another.
    """
    every = without_limits([*dict.fromkeys(key for run in runs for key in run.series if key != "information/ceiling")])
    keys = [k for k in every if any(len(run.series.get(k, ())) > 1 for run in runs)]
    zero = [k for k in keys if all(v == 0 for run in runs for _, v in run.series.get(k, ()))]
    first = (
        "loss", "kl", "reward/", "agreement/", "information/infonce", "information/preference",
        "steerability/", "front/hv", "front/mip", "front/crd",
    )  # fmt: skip
    places = {k: next((i for i, start in enumerate(first) if k.startswith(start)), None) for k in keys if k not in zero}
    main = sorted((k for k in places if places[k] is not None), key=lambda k: (places[k], k))
    return main, sorted(k for k in places if places[k] is None), sorted(zero)
