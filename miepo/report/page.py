"""The page of a report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from math import isclose, isfinite
from pathlib import Path
from typing import Any

import jinja2

from miepo.callbacks.evaluation_table import obedience, table_rows
from miepo.errors import UserError, first_line
from miepo.preferences import format_preference
from miepo.report import intervals, pictures
from miepo.report.runs import RunRecord, differing, incomparable, read_runs
from miepo.report.text import finished, shortened
from miepo.resources import is_folder

PAGE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Report:
    """A page about runs, complete in itself. In a notebook it shows itself."""

    html: str

    def save(self, path: str | Path) -> Path:
        """Write the page; a file of that name is replaced once the new one is whole.

        Raises:
            UserError: it cannot be written there.
        """
        target = Path(path)
        if not is_folder(target.parent):
            raise UserError(f"expected a folder to write the report into, got '{target.parent}', which is none")
        if is_folder(target):
            raise UserError(f"expected a file for the report, got '{target}', which is a folder")
        special = False
        with suppress(OSError, ValueError):  # of a name that no file can have, writing tells
            target = target.resolve() if target.is_symlink() else target
            special = target.exists() and not target.is_file()
        if special:
            raise UserError(f"expected a file for the report, got '{target}', which is a device or the like")
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_text(self.html, encoding="utf-8")
            partial.replace(target)
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError):
                partial.unlink()
            raise UserError(f"expected a file for the report that can be written, got {first_line(error)}") from None
        return target

    def _repr_html_(self) -> str:
        """Return a frame, in which the page keeps its styles to itself; nothing in it may run."""
        style = "width: 100%; height: 800px; border: 1px solid #ddd"
        return f'<iframe srcdoc="{escape(self.html)}" style="{style}" sandbox title="Report"></iframe>'


def report(runs: str | Path | Sequence[str | Path], prompts: int = 4) -> Report:
    """Return a report about one or several runs.

    Args:
        runs: The folders of the runs.
        prompts: How many prompts are shown with the answers under every preference vector.

    Raises:
        UserError: a folder is none of a run, a file in it is malformed, or the runs have different objectives.
    """
    if prompts < 0:
        raise UserError(f"a report shows the answers to some prompts: expected 0 or more, got {prompts}")
    records = read_runs([runs] if isinstance(runs, (str, Path)) else runs)
    environment = jinja2.Environment(autoescape=True, finalize=finished, undefined=jinja2.StrictUndefined)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return Report(template.render(page_of(records, prompts), picture=pictures.data_uri))


def page_of(runs: Sequence[RunRecord], prompts: int) -> dict[str, Any]:
    """Return what the template shows."""
    main, others, zero = pictures.curves(runs)
    measured = [before_and_after(run) for run in runs]
    answered = [run for run in runs if run.answers]
    return {
        "title": runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        "names": (answered or runs)[0].names,
        "runs": [{"record": run, "style": pictures.style(i)} for i, run in enumerate(runs)],
        "settings": [
            (key, [shortened(value, 200) for value in values])
            for key, values in (differing([run.config for run in runs]) if len(runs) > 1 else [])
        ],
        "columns": [columns for columns, _ in measured],
        "rows": table_rows([column.figures for columns, _ in measured for column in columns]),
        "obedience": [
            (run.label, obedience([c for c in columns if c.title != "change"][-1].figures, run.names))
            for run, (columns, _) in zip(runs, measured, strict=True)
            if columns
        ],
        "incomparable": incomparable(runs),
        "notes": [note for _, note in measured if note],
        "reference_points": [f"{point:g}" for point in sorted({run.reference_point for run in runs})],
        "fronts": pictures.draw_fronts(runs),
        "kept_fronts": [(run, uri) for run in runs if not pictures.front(run.latest) and (uri := kept_front(run))],
        "curves": [(key, pictures.draw_curve(key, runs)) for key in main],
        "other_curves": [(key, pictures.draw_curve(key, runs)) for key in others],
        "smoothed": any(len(p) > pictures.SMOOTHED for run in runs for p in run.series.values()),
        "zero": zero,
        "rewards": [(run, [pictures.draw_rewards(run, k) for k in range(len(run.names))]) for run in answered],
        "overlaps": [(run, overlaps(run)) for run in answered],
        "samples": samples(answered, prompts),
        "unanswered": [run for run in runs if not run.answers],
    }


@dataclass(frozen=True)
class Column:
    """Of the table: figures by their logged names."""

    title: str
    figures: Mapping[str, float]


def before_and_after(run: RunRecord) -> tuple[list[Column], str]:
    """Return the first evaluation, the last and the change between them, and what is to be said about them."""
    columns, partial = [], []
    for evaluation in (run.first, run.last):
        if evaluation is None:
            continue
        figures, answers = dict(evaluation.figures), evaluation.answers
        if answers and agree(intervals.point_estimates(answers, run.reference_point), figures):
            figures |= intervals.chance_of(answers, run.reference_point) | intervals.slopes_of(answers)
            figures |= intervals.front_of(answers, run.reference_point)
        elif answers:
            partial.append(f"{len(answers.positions.unique())} prompts at {evaluation.title}")
        columns.append(Column(evaluation.title, figures))
    if partial:
        return columns, (
            f"{run.label}: HV, MIP and CRD are the logged ones, without intervals: the answers that were kept "
            f"({', '.join(partial)}) have others."
        )
    old, new = run.first and run.first.answers, run.last and run.last.answers
    if old and new and intervals.same_prompts(old, new):
        change = intervals.front_of(new, run.reference_point, old) | intervals.slopes_of(new, old)
        columns.append(Column("change", change))
    return columns, ""


def agree(points: Mapping[str, float], logged: Mapping[str, float]) -> bool:
    """Return whether the figures of the answers that were kept are those of the log, up to its single precision."""
    return all(
        isclose(points[key], logged[key], rel_tol=1e-3, abs_tol=1e-5)
        for key in points
        if key in logged and isfinite(points[key])
    )


def overlaps(run: RunRecord) -> list[tuple[str, str, int]]:
    """Return title, overlap and prompts of the first and the last evaluation."""
    answered = [(e.title, e.answers) for e in (run.first, run.last) if e and e.answers]
    values = [(title, answers, intervals.overlap(answers)) for title, answers in answered]
    return [(title, f"{v:.3f}" if isfinite(v) else "–", len(a.positions.unique())) for title, a, v in values]


def kept_front(run: RunRecord) -> str | None:
    """Return the last picture that the run itself drew."""
    found = sorted((run.folder / "fronts").glob("step_*.png"))
    return "data:image/png;base64," + base64.b64encode(found[-1].read_bytes()).decode() if found else None


def samples(runs: Sequence[RunRecord], prompts: int) -> list[dict[str, Any]]:
    """Return the first prompts of the first run's evaluation, with every run's answers in the order of the grid."""
    if not runs or not runs[0].answers:
        return []
    latest = runs[0].answers
    texts = [text for _, text in sorted(dict(zip(latest.positions.tolist(), latest.prompts, strict=True)).items())]
    return [
        {"prompt": shortened(text), "runs": [(run, answers(run, text)) for run in runs]}
        for text in [*dict.fromkeys(texts)][:prompts]
    ]


def answers(run: RunRecord, prompt: str) -> list[dict[str, Any]]:
    """Return the answers to one prompt, with preference and rewards as text."""
    latest = run.answers
    assert latest is not None
    rows = [i for i, text in enumerate(latest.prompts) if text == prompt]
    return [
        {
            "preference": format_preference(latest.grid[latest.grid_index[i]], latest.names),
            "rewards": [
                (name, f"{value:.2f}" if isfinite(value) else "–")
                for name, value in zip(latest.names, latest.scores[i].tolist(), strict=True)
            ],
            "response": shortened(latest.responses[i]),
        }
        for i in sorted(rows, key=lambda i: int(latest.grid_index[i]))
    ]
