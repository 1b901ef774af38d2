"""The table at the end: before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.callbacks.pareto_front import ParetoFront
from miepo.metrics import follows
from miepo.training.reporting import log_table

PREFIXES = ("front/", "information/", "steerability", "side_effect/")
OF_STEPS = "information/infonce"  # the only figure of these that a step of training logs


class EvaluationTable(EvaluationCallback):
    """Keeps the figures of the first and the last evaluation and prints them when the run ends."""

    along_preferences = False

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.last = state_dict["first"], state_dict.get("last", {})

    def after_evaluation(self, trainer: Trainer, module: Any) -> None:
        found = trainer.callback_metrics
        metrics = {k: v.item() for k, v in found.items() if k.startswith(PREFIXES) and k != OF_STEPS}
        self.last = {"step": trainer.global_step, "metrics": metrics}
        self.first = self.first or self.last
        if trainer.state.fn != "fit":
            self._report(trainer, module, {"value": self.last})

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.last:
            both = self.first["step"] != self.last["step"]
            columns = {"before": self.first, "after": self.last} if both else {"value": self.last}
            self._report(trainer, pl_module, columns)

    def _report(self, trainer: Trainer, module: Any, columns: dict[str, dict[str, Any]]) -> None:
        rows = table_rows(list(columns.values()))
        steps = trainer.state.fn == "fit"  # an evaluation of a checkpoint does not know its step
        head = [f"{title} (step {column['step']})" if steps else title for title, column in columns.items()]
        if trainer.is_global_zero:
            log_table(trainer, "evaluation", ["metric", *columns], [[r[0], *map(str, r[1:])] for r in rows])
        fronts = [c for c in trainer.callbacks if isinstance(c, ParetoFront)]  # type: ignore[attr-defined]
        rank_zero_info("\n" + format_table(["metric", *head], rows))
        for line in obedience([*columns.values()][-1]["metrics"], module.names):
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
        best = getattr(trainer.checkpoint_callback, "last_model_path", "")
        if best and trainer.state.fn == "fit":
            rank_zero_info(f"Checkpoint: {best}")


def obedience(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return a sentence for each objective whose slope was measured: whether it follows its weight."""
    found = []
    for name in names:
        key = f"steerability/{name}"
        if key in metrics:
            found.append(follows(name, metrics[key], *(metrics.get(f"{key}_{end}", nan) for end in ("low", "high"))))
    return found


def table_rows(columns: list[dict[str, Any]]) -> list[list[str]]:
    """Return rows of the printed table, from figures by their logged names."""
    keys = sorted({key for c in columns for key in c["metrics"]})
    slopes = [key for key in keys if key.startswith("steerability/")]
    slopes = [key for key in slopes if not any(f"{other}_{end}" == key for other in slopes for end in ("low", "high"))]
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
    if any(c["metrics"].get("front/left_out") for c in columns):
        named["answers without a score"] = "front/left_out"
    rows = [[title, *(_cell(c["metrics"], key) for c in columns)] for title, key in named.items()]
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def _cell(metrics: dict[str, float], key: str) -> str:
    if isnan(metrics.get(key, nan)):
        return "-"
    text = f"{metrics[key]:.3g}" if abs(metrics[key]) < 0.01 else f"{metrics[key]:.3f}"
    if key == "front/hv_above_chance" and "front/hv_p" in metrics:
        text += f" (p {metrics['front/hv_p']:.3f})"
    if not isnan(metrics.get(f"{key}_low", nan)):
        text += f" [{metrics[f'{key}_low']:z.3f}, {metrics[f'{key}_high']:z.3f}]"  # no -0.000
        if key == "information/preference":
            text += f" of {metrics['information/ceiling']:.2f}"
    return text


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Return plain text in aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
