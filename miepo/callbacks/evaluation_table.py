"""The table at the end: before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.callbacks.pareto_front import ParetoFront
from miepo.evaluation import Evaluation
from miepo.metrics import follows
from miepo.metrics.steerability import without_limits
from miepo.training.reporting import log_table

# what the callbacks of miepo measure: the table has a part of it, under other names
NAMED = ("steerability", "steerability_rank", "side_effect", "front", "information", "count")


class EvaluationTable(EvaluationCallback):
    """Prints the figures of the first and the last evaluation when the run ends."""

    along_preferences = False

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn != "fit" and module.evaluation is not None:
            self._report(trainer, module, [module.evaluation])

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.evaluations:
            self._report(trainer, pl_module, pl_module.evaluations)

    def _report(self, trainer: Trainer, module: Any, evaluations: Sequence[Evaluation]) -> None:
        rows = table_rows([evaluation.figures for evaluation in evaluations])
        titles = ["before", "after"] if len(evaluations) == 2 else ["value"]
        head = [
            title if evaluation.step is None else f"{title} ({evaluation.title})"
            for title, evaluation in zip(titles, evaluations, strict=True)
        ]
        if trainer.is_global_zero:
            log_table(trainer, "evaluation", ["metric", *titles], rows)
        fronts = [c for c in trainer.callbacks if isinstance(c, ParetoFront)]  # type: ignore[attr-defined]
        rank_zero_info("\n" + format_table(["metric", *head], rows))
        for line in obedience(evaluations[-1].figures, module.names):
            rank_zero_info(line)
        by = [
            f"{o.name} by mean {o.normalisation.mean:.4g}, sd {o.normalisation.sd:.4g}"
            for o in module.objectives
            if o.normalisation is not None
        ]
        rank_zero_info(f"Rewards are normalised: {'; '.join(by)}.")
        for front in fronts:
            rank_zero_info(f"The hypervolume's reference point is {front.reference_point:g} on every axis.")
            if front.picture:
                rank_zero_info(f"Pareto front: {front.picture}")


def obedience(figures: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return a sentence for each objective whose slope was measured: whether it follows its weight."""
    found = []
    for name in names:
        key = f"steerability/{name}"
        if key in figures:
            found.append(follows(name, figures[key], *(figures.get(f"{key}_{end}", nan) for end in ("low", "high"))))
    return found


def table_rows(columns: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return rows of the printed table, from columns of figures by their logged names.

    The figures of a user's own callbacks come last, under the names that they are logged by.
    """
    keys = sorted({key for figures in columns for key in figures})
    slopes = without_limits([key for key in keys if key.startswith("steerability/")])
    named = {f"slope of {key.removeprefix('steerability/')}, sd (up)": key for key in slopes}
    named |= {
        "HV (up)": "front/hv",
        "HV, bias taken off (up)": "front/hv_corrected",
        "HV above chance (up)": "front/hv_above_chance",
        "MIP (up)": "front/mip",
        "of it following w (up)": "front/mip_covariance",
        "CRD (down)": "front/crd",
        "I(Y;W|X), nats (up)": "information/preference",
    }
    named |= {f"sd of {key.removeprefix('front/sd/')}": key for key in keys if key.startswith("front/sd/")}
    named["answers that ended (up)"] = "front/finished"
    if any(figures.get("front/left_out") for figures in columns):
        named["answers without a score"] = "front/left_out"
    named |= {key: key for key in without_limits([key for key in keys if key.split("/")[0] not in NAMED])}
    rows = [[title, *(_cell(figures, key) for figures in columns)] for title, key in named.items()]
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def _cell(figures: Mapping[str, float], key: str) -> str:
    if isnan(figures.get(key, nan)):
        return "-"
    value = figures[key] if abs(figures[key]) > 1e-9 else 0.0  # what rounding left
    text = f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}"
    if key == "front/hv_above_chance" and "front/hv_p" in figures:
        text += f" (p {figures['front/hv_p']:.3f})"
    if not isnan(figures.get(f"{key}_low", nan)):
        text += f" [{figures[f'{key}_low']:z.3f}, {figures[f'{key}_high']:z.3f}]"  # no -0.000
        if key == "information/preference":
            text += f" of {figures['information/ceiling']:.2f}"
    return text


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Return plain text in aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
