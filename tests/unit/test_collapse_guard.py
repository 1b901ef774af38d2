"""Every kind of collapse is said by name, once; steps without finite gradients are left out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from miepo.callbacks import CollapseGuard
from miepo.errors import UserError
from miepo.exploration import InfoNCE
from miepo.objectives import Objective
from miepo.rollout import TransformersEngine
from tests.helpers.fit import tiny_run
from tests.helpers.tiny import randomise_adapter


class Says(TransformersEngine):
    """As if the policy had said something else."""

    def __init__(self, change: Callable[[list[list[str]]], list[list[str]]]) -> None:
        super().__init__()
        self.change = change

    def draw(self, *args: Any) -> Any:
        found = super().draw(*args)
        found.texts[:] = self.change(list(found.texts))
        return found


class Alike(Objective):
    def score(self, prompts, responses):
        return [1.0 + 0.001 * len(r) for r in responses]


class Far(Callback):
    """Takes the adapter far from where it was."""

    def on_train_start(self, trainer, pl_module) -> None:
        randomise_adapter(pl_module.policy, scale=3.0)


def said(model: Path, root: Path, guard: CollapseGuard, **settings: Any) -> list[str]:
    settings["trainer"] = {"max_steps": 4, "callbacks": [guard, *settings.pop("callbacks", [])]}
    trainer, module, data = tiny_run(model, root, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    return [m for w in caught if "over 2 steps" in (m := str(w.message))]


GIVEN = {"mean": 0.0, "sd": 1.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "empty": (r"empty responses: 100% of the responses have no text", {"data": {"engine": Says(lambda t: [["", ""] for _ in t])}}),
    "identical": (
        r"identical responses: 100% of the pairs are twice the same text", {"data": {"engine": Says(lambda t: [["a", "a"] for _ in t])}},
    ),
    "spread": (r"spread of alike: its rewards differ by 0.0\d* sd", {"objectives": [Alike(normalisation=GIVEN)]}),
    "kl": (r"KL: the policy is \S+ nats per response from the reference", {"callbacks": [Far()]}),
    "information": (r"information: the bound stands at 0.\d+ of at most 0.693 nats", {"callbacks": [Far()]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_collapse_is_said_by_name_and_once(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    message, settings = CASES[kind]
    guard = CollapseGuard(window=2, kl=1.0, ceiling=0.01)
    found = said(tiny_model, tmp_path, guard, module={"exploration": InfoNCE(0.3)}, **settings)
    assert sum(re.match(message, m) is not None for m in found) == 1, found


def test_a_healthy_run_hears_nothing(tiny_model: Path, tmp_path: Path) -> None:
    assert said(tiny_model, tmp_path, CollapseGuard(window=2)) == []


class Breaks(Callback):
    """Puts NaN into a gradient at some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.done, self.before = steps, 0, []

    def on_after_backward(self, trainer, pl_module) -> None:
        self.before.append([p.detach().clone() for p in pl_module.policy.adapter_parameters().values()])
        if self.done in self.steps:
            next(iter(pl_module.policy.adapter_parameters().values())).grad[0, 0] = torch.nan
        self.done += 1


def test_a_step_without_finite_gradients_is_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    breaks, guard = Breaks({1, 2, 4}), CollapseGuard()
    settings = {"max_steps": 6, "gradient_clip_val": 1.0, "callbacks": [breaks, guard]}
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer=settings, module={"warmup": 0.0})
    with (
        pytest.warns(UserWarning, match=r"step \d is left out: its gradients are not finite"),
        pytest.warns(UserWarning, match="of 6 steps 3 were left out"),
    ):
        trainer.fit(module, data)
    same = [all(map(torch.equal, a, b)) for a, b in zip(breaks.before, breaks.before[1:], strict=False)]
    assert same == [False, True, True, False, True]
    assert guard.skipped == 3
    assert trainer.callback_metrics["count/skipped_steps"] == 3
    assert all(p.isfinite().all() for p in module.policy.adapter_parameters().values())


def test_three_in_a_row_end_the_run(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, trainer={"max_steps": 6, "callbacks": [Breaks({1, 2, 3}), CollapseGuard()]}
    )
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UserError, match="3 steps in a row were not finite: the run ends"),
    ):
        trainer.fit(module, data)
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"empty": 1.5}, "CollapseGuard.empty is a share, from 0 to 1, got 1.5"),
        ({"window": 0}, "CollapseGuard.window must be at least 1, got 0"),
        ({"kl": 0.0}, "CollapseGuard.kl must be positive, got 0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CollapseGuard(**settings)
