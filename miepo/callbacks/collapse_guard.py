"""What goes wrong in online preference optimisation, said by name while it can still be stopped."""

from __future__ import annotations

from collections import deque
from math import isnan, log
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from miepo.errors import UserError
from miepo.recorded import Recorded
from miepo.training.distributed import gathered
from miepo.types import PreferenceBatch


class CollapseGuard(Recorded, Callback):
    """Warns of a collapse, each kind once, and leaves out steps whose gradients are not finite.

    Means are over the last ``window`` steps. ``count/skipped_steps`` in the log is how many steps were left out;
    ``limit`` of them in a row end the run, whose last checkpoint has the weights from before them.

    Args:
        empty: Warn when more than this share of the responses is empty.
        identical: Warn when in more than this share of the pairs both responses are the same.
        kl: Warn when the KL to the reference is above so many nats per response.
        spread: Warn when the standard deviation of an objective's rewards is below this share of the one it was
            normalised by.
        ceiling: Warn when the in-batch bound of the information is above this share of what it can be at most: it
            no longer tells more from much.
        window: Steps.
        limit: Steps without finite gradients in a row that end the run.
    """

    def __init__(
        self,
        empty: float = 0.5,
        identical: float = 0.5,
        kl: float = 100.0,
        spread: float = 0.05,
        ceiling: float = 0.95,
        window: int = 10,
        limit: int = 3,
    ) -> None:
        for name, value in (("empty", empty), ("identical", identical), ("spread", spread), ("ceiling", ceiling)):
            if not 0 <= value <= 1:
                raise UserError(f"CollapseGuard.{name} is a share, from 0 to 1, got {value}")
        for name, value in (("window", window), ("limit", limit)):
            if value < 1:
                raise UserError(f"CollapseGuard.{name} must be at least 1, got {value}")
        if not kl > 0:
            raise UserError(f"CollapseGuard.kl must be positive, got {kl}")
        self.empty, self.identical, self.kl, self.spread, self.ceiling = empty, identical, kl, spread, ceiling
        self.window, self.limit = window, limit
        self.seen: deque[dict[str, float]] = deque(maxlen=window)
        self.said: list[str] = []
        self.skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "said": self.said, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = deque(state_dict["seen"], self.window)
        self.said, self.skipped, self.in_a_row = (state_dict[key] for key in ("said", "skipped", "in_a_row"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Look at the gradients before clipping, which would make NaN of every gradient."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # of several processes each has the same sum; asked once, since a device is waited for at every answer
        if not gradients or torch.stack([g.isfinite().all() for g in gradients]).all():
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"the gradients of {self.in_a_row} steps in a row were not finite: the run ends; its last checkpoint "
                "has the weights from before them"
            )
        rank_zero_warn(f"step {trainer.global_step} is left out: its gradients are not finite")
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = None  # which the optimiser passes over

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.skipped:
            rank_zero_warn(
                f"of {trainer.global_step} steps {self.skipped} were left out, since their "
                "gradients were not finite (a loss that is not a number, such as of a response without a score)"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("count/skipped_steps", float(self.skipped), batch_size=len(batch))
        if not isinstance(batch, PreferenceBatch):
            return
        parts = gathered(trainer, self._figures(trainer, pl_module.names, batch))
        self.seen.append({key: sum(part[key] for part in parts) / len(parts) for key in parts[0]})
        if len(self.seen) == self.window:
            for kind, message in self._collapses(pl_module, batch.counterfactual.shape[1]):
                if kind not in self.said:
                    self.said.append(kind)
                    rank_zero_warn(f"{kind}: {message}, over {self.window} steps")

    def _figures(self, trainer: Trainer, names: tuple[str, ...], batch: PreferenceBatch) -> dict[str, float]:
        same = [len(set(texts)) == 1 for texts in batch.responses.texts]
        figures = {"empty": float(batch.responses.empty.float().mean()), "identical": sum(same) / len(same)}
        for k, name in enumerate(names):
            scores = batch.scores[..., k].flatten()
            scores = scores[scores.isfinite()]
            figures[f"spread/{name}"] = float(scores.std()) if len(scores) > 1 else float("nan")
        logged = trainer.callback_metrics
        for key, metric in (("kl", "kl"), ("information", "information/infonce")):
            figures[key] = float(logged.get(metric, torch.nan))
        return figures

    def _collapses(self, module: Any, counterfactuals: int) -> list[tuple[str, str]]:
        mean = {key: _mean([step[key] for step in self.seen]) for key in self.seen[0]}
        found = []
        if mean["empty"] > self.empty:
            found.append(("empty responses", f"{mean['empty']:.0%} of the responses have no text"))
        if mean["identical"] > self.identical:
            found.append(("identical responses", f"{mean['identical']:.0%} of the pairs are twice the same text"))
        if mean["kl"] > self.kl:
            found.append(("KL", f"the policy is {mean['kl']:.3g} nats per response from the reference"))
        for name in module.names:
            if mean[f"spread/{name}"] < self.spread:
                found.append(
                    (
                        f"spread of {name}",
                        f"its rewards differ by {mean[f'spread/{name}']:.2g} sd, so that it orders little",
                    )
                )
        limit = log(1 + counterfactuals)
        if counterfactuals and mean["information"] > self.ceiling * limit:
            found.append(
                ("information", f"the bound stands at {mean['information']:.3g} of at most {limit:.3g} nats: more "
                 "counterfactual preferences would let it tell more")
            )  # fmt: skip
        return found


def _mean(values: list[float]) -> float:
    """Return the mean of those that are numbers; NaN, which is above and below nothing, where none is."""
    numbers = [value for value in values if not isnan(value)]
    return sum(numbers) / len(numbers) if numbers else float("nan")
