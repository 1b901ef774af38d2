"""The report of a study: one HTML page that needs no network, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from miepo.errors import UserError
from tools.study import analysis
from tools.study.analysis import Estimate
from tools.study.rows import Rows
from tools.study.study import Run, Study, named

PAGE = Path(__file__).with_name("report.html.jinja")


def write_report(study: Study, found: Rows, notes: Sequence[str], runs: Sequence[Run], folder: Path) -> Path:
    """Write ``results.csv``, ``summary.md``, the pictures and ``report.html`` into ``folder``; returns the page.

    Args:
        study: What is reported.
        found: Rows of finished runs.
        notes: What a reader has to know of them.
        runs: All runs of the study.
        folder: Of the study.

    Raises:
        UserError: the runs had different budgets.
    """
    table = analysis.tidy(found)
    failures = {run.name: run.failure for run in runs if run.failure and run.key not in found}
    if table.empty:
        lines = "; ".join(f"{name}: {why}" for name, why in failures.items()) or "none was started"
        raise UserError(f"expected finished runs, got none: {lines}")
    last = analysis.final(table)
    table.to_csv(folder / "results.csv", index=False)
    vertices = named(study.true_front)() if study.true_front else None
    ceilings = {}
    if vertices is not None:
        ceilings["front/hv_corrected"] = analysis.true_hypervolume(vertices, last.reference_point.iloc[0])
        ceilings["front/mip"] = analysis.true_mip(vertices, analysis.grid_of(found))
    sections = sections_of(study, last, ceilings)
    figures = {"information": draw_information(study, table)}
    if len(_objective_names(found)) == 2:
        figures = {"fronts": draw_fronts(study, found, vertices)} | figures
    pictures = {}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        pictures[name] = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    unfinished = [run.name for run in runs if run.key not in found and not run.failure]
    (folder / "summary.md").write_text(markdown(sections, notes, failures, unfinished))
    text = jinja2.Environment(autoescape=True).from_string(PAGE.read_text()).render(
        name=study.name, sections=sections, pictures=pictures, notes=notes, failures=failures, unfinished=unfinished,
        work=analysis.work(last), reference_point=last.reference_point.iloc[0],
        ceilings=ceilings,
        captions={
            "fronts": "Empirical attainment surfaces over seeds (dark: reached by half of the runs; band: by a quarter "
            "and by three quarters)" + (", and the true front (dashed)." if vertices is not None else "."),
            "information": "I(Y;W|X) over training: mean over seeds, band: 95 % t interval.",
        },
    )  # fmt: skip
    page = folder / "report.html"
    page.write_text(text)
    return page


def sections_of(study: Study, last: pd.DataFrame, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Return the tables of the report.

    Means, slopes above zero, differences to the baseline, at equal KL, and to each control, relative margins.

    Args:
        study: What is reported.
        last: The last evaluation of every run.
        ceilings: What the true front has, for each column where that is known.
    """
    titles = {column: title + _arrow(better) for column, (title, better) in analysis.columns(study, last).items()}
    means = analysis.summary(study, last)
    label = {name: study.methods[name].label for name in means}
    seeds = {name: int((last.method == name).sum()) for name in means}

    def table(title: str, note: str, rows: dict[str, dict[str, Estimate]], signed: bool) -> dict[str, Any]:
        cells = [
            {
                "label": text,
                "cells": [
                    {"text": format_estimate(values[c], signed), "clear": signed and values[c].excludes_zero}
                    for c in values
                ],
            }
            for text, values in rows.items()
        ]
        head = [titles.get(column, column) for column in next(iter(rows.values()))]
        return {"title": title, "note": note, "head": head, "rows": cells}

    sections = [
        table("Means over seeds", "In brackets: 95 % t interval over seeds.",
              {f"{label[n]} ({seeds[n]})": v for n, v in means.items()}, False),
    ]  # fmt: skip
    if any(column.startswith("slope_low/") for column in last.columns):
        sections.append(_obeying(last, label))
    base = study.baseline
    others = [n for n in means if n != base]
    if base in means and others:
        sections.append(
            table(f"Difference to {label[base]}", f"Paired by seed and precision. {chance(seeds, others, len(titles))}",
                  {label[n]: analysis.paired(study, last, n, base) for n in others}, True)
        )  # fmt: skip
        margins = {label[n]: _margins(last, n, base, ceilings) for n in others}
        note = "Change of the means in per cent of the baseline's."
        if ceilings:
            front = " and ".join(f"{MARGINS[column]} {value:.3f}" for column, value in ceilings.items())
            note += f" Gap: share of the distance to the true front, which has {front}, that is closed."
        sections.append(table(f"Relative to {label[base]}, per cent", note, margins, True))
    if base in means and (moved := analysis.at_equal(study, last, [n for n in study.at_equal_kl if n in means], "kl")):
        compared = list(next(iter(moved.values()))[1])
        differences = {"a nat of KL": {c: kl for c, (kl, _) in moved.items()}}
        differences |= {label[n]: {c: values[n] for c, (_, values) in moved.items()} for n in compared}
        note = f"What a nat of KL goes with, and what differs from {label[base]} beyond it: a linear regression on KL, "
        note += f"seed and method. {chance(seeds, compared, len(moved))}"
        sections.append(table(f"At the KL of {label[base]}", note, differences, True))
    pairs = [(n, c) for n in means for c in study.methods[n].controls if c in means]
    if pairs:
        differences = {f"{label[n]} − {label[c]}": analysis.paired(study, last, n, c) for n, c in pairs}
        note = "The same settings without what is tested; paired by seed and precision. "
        note += chance(seeds, [n for n, _ in pairs], len(titles))
        sections.append(table("Difference to the controls", note, differences, True))
    return sections


def _obeying(last: pd.DataFrame, label: Mapping[str, str]) -> dict[str, Any]:
    """Return the table that counts which slopes are above zero by their interval over prompts."""
    rows = []
    for name, text in label.items():
        above, whole = analysis.clear_slopes(last, name)
        rows.append({"label": text, "cells": [{"text": f"{above} of {whole}", "clear": False}]})
    note = "By the 95 % t interval of each over the prompts of its run."
    return {"title": "Slopes above zero", "note": note, "head": ["slopes"], "rows": rows}


def chance(seeds: Mapping[str, int], methods: Sequence[str], figures: int) -> str:
    """Say how many of the intervals exclude zero by chance; of few seeds none is called clear of it."""
    comparisons = figures * sum(seeds[name] >= analysis.CLEAR_SEEDS for name in methods)
    if not comparisons:
        return f"With fewer than {analysis.CLEAR_SEEDS} seeds no interval is called clear of zero."
    return (
        f"Bold: the interval excludes zero, as about {0.05 * comparisons:.1f} of these {comparisons} would "
        "where nothing differs."
    )


MARGINS = {"front/hv_corrected": "HV", "front/mip": "MIP", "front/crd": "CRD"}


def _margins(last: pd.DataFrame, method: str, base: str, ceilings: dict[str, float]) -> dict[str, Estimate]:
    wanted = {title: (column, 0.0) for column, title in MARGINS.items()}
    wanted |= {f"{MARGINS[column]} gap": (column, top) for column, top in ceilings.items()}
    values = {k: analysis.relative(last, method, base, c, top) for k, (c, top) in wanted.items()}
    return {
        k: Estimate(*(None if x is None else 100 * x for x in (v.mean, v.low, v.high)), v.seeds)  # type: ignore[arg-type]
        for k, v in values.items()
    }  # fmt: skip


def _arrow(better: str) -> str:
    return {"up": " ↑", "down": " ↓", "": ""}[better]


def format_estimate(value: Estimate, signed: bool = False) -> str:
    """Return ``1.23 [1.10, 1.35]``, without a bracket where there is one seed."""
    if value.seeds == 0:
        return "–"
    digits = 1 if abs(value.mean) >= 10 else 3 if abs(value.mean) >= 0.1 else 4
    sign = "+" if signed else ""
    text = f"{value.mean:{sign}.{digits}f}"
    return text if value.low is None else f"{text} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def markdown(
    sections: Sequence[dict[str, Any]],
    notes: Sequence[str],
    failures: dict[str, str | None],
    unfinished: Sequence[str],
) -> str:
    """Return the tables as Markdown."""
    lines = []

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    for section in sections:
        lines += [f"### {section['title']}", "", section["note"], ""]
        lines += [line(["method", *section["head"]]), "|---" * (len(section["head"]) + 1) + "|"]
        for row in section["rows"]:
            cells = [f"**{c['text']}**" if c["clear"] else c["text"] for c in row["cells"]]
            lines.append(line([row["label"], *cells]))
        lines.append("")
    if notes:
        lines += ["### Notes", "", *(f"- {note}" for note in notes), ""]
    if failures:
        lines += ["### Failed runs, not in the tables", "", *(f"- {n}: {why}" for n, why in failures.items()), ""]
    if unfinished:
        lines += ["### Runs that have not finished, not in the tables", "", *(f"- {n}" for n in unfinished), ""]
    return "\n".join(lines)


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_fronts(study: Study, found: Rows, vertices: np.ndarray | None) -> Figure:
    """Draw one panel per method: attainment surfaces over seeds, with the baseline's median for comparison."""
    sets = {name: each for name in study.methods if (each := analysis.fronts(found, name))}
    surfaces = {name: analysis.attainment(each) for name, each in sets.items()}
    names = _objective_names(found)
    across = min(3, len(sets))
    down = -(-len(sets) // across)
    figure = Figure(figsize=(4.2 * across, 3.8 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    points = np.concatenate([s for each in sets.values() for s in each] + ([vertices] if vertices is not None else []))
    low, high = points.min(0) - 0.15, points.max(0) + 0.15
    for axis, (name, levels) in zip(axes, surfaces.items(), strict=False):
        if vertices is not None:
            axis.plot(*vertices.T, "--", color="0.35", lw=1, label="true front")
        if name != study.baseline and study.baseline in surfaces:
            axis.plot(
                *_staircase(surfaces[study.baseline][50], low).T,
                color="0.6",
                lw=1.5,
                label=study.methods[study.baseline].label,
            )
        for level, alpha in ((25, 0.15), (75, 0.3)):
            steps = _staircase(levels[level], low)
            axis.fill_between(steps[:, 0], low[1], steps[:, 1], color="C0", alpha=alpha, lw=0)
        axis.plot(*_staircase(levels[50], low).T, color="C0", lw=2, label="half of the runs")
        axis.set(title=study.methods[name].label, xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axis.set(xlabel=f"{names[0]} (normalised)", ylabel=f"{names[1]} (normalised)")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="lower left")
    for axis in axes[len(surfaces) :]:
        axis.set_visible(False)
    return figure


def _objective_names(found: Rows) -> list[str]:
    names: list[str] = next(iter(found.values()))[-1]["names"]
    return names


def _staircase(points: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return the boundary of what ``points`` ``(n, 2)`` dominate, from left to right."""
    ordered = points[np.argsort(points[:, 0])]
    path = [(low[0], ordered[0, 1])]
    for i, (x, y) in enumerate(ordered):
        path += [(x, y), (x, ordered[i + 1, 1] if i + 1 < len(ordered) else low[1])]
    return np.array(path)


def draw_information(study: Study, table: pd.DataFrame) -> Figure:
    """Draw I(Y;W|X) against the optimiser step, a line per method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (name, method) in enumerate(study.methods.items()):
        rows = table[table.method == name]
        if rows.empty or "information/preference" not in rows:
            continue
        steps = sorted(rows.step.unique())
        values = [analysis.estimate(rows.loc[rows.step == s, "information/preference"]) for s in steps]
        line = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}
        axis.plot(steps, [v.mean for v in values], label=method.label, **line)
        if all(v.low is not None for v in values):
            axis.fill_between(steps, [v.low for v in values], [v.high for v in values], color=line["color"], alpha=0.15)
    axis.set(xlabel="optimiser steps", ylabel="I(Y;W|X), nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
