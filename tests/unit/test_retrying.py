"""Objectives that fail now and then."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from miepo.errors import ObjectiveError, UserError
from miepo.objectives import RetryingObjective
from miepo.objectives.base import identity_of
from tests.helpers.fit import rollout, step, tiny_run
from tests.helpers.tiny import Broken, Length, Letters, Moody, fails


def ask(objective: RetryingObjective, *texts: str) -> list[float]:
    return objective.reward(["x"] * len(texts), texts).tolist()


def test_it_asks_again_and_has_the_scores_of_the_other() -> None:
    inner = Moody([fails, lambda: [1.0], fails])  # down, a wrong shape, down
    objective = RetryingObjective(inner, retries=3, backoff=0.0)
    assert ask(objective, "ab", "c") == [-2.0, -1.0]
    assert inner.calls == 4
    assert (objective.name, objective.normalisation, objective.normalisation_given) == (
        "moody",
        inner.normalisation,
        True,
    )
    assert identity_of(objective)["of"] == identity_of(inner)


def test_it_waits_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("miepo.objectives.retrying.sleep", waited.append)
    with pytest.raises(ObjectiveError, match="After 4 attempts: objective moody failed to score: ConnectionError: the"):
        ask(RetryingObjective(Moody([fails] * 9), retries=3, backoff=0.5), "a")
    assert waited == [0.5, 1.0, 2.0]


def test_no_answer_in_time_is_a_failure() -> None:
    never = threading.Event()
    objective = RetryingObjective(Moody([never.wait]), timeout=0.1, retries=0)
    with pytest.raises(ObjectiveError, match=r"objective moody: no answer in 0.1 s"):
        ask(objective, "a")
    assert ask(RetryingObjective(Moody([]), timeout=20.0), "abc") == [-3.0]
    with pytest.raises(ObjectiveError, match="server is down"):
        ask(RetryingObjective(Moody([fails]), timeout=20.0, retries=0), "a")
    never.set()


def test_a_server_that_was_never_there_is_a_mistake() -> None:
    objective = RetryingObjective(Moody([fails]), retries=5, on_failure="skip")
    with pytest.raises(ObjectiveError, match="moody failed to score"):
        objective.load_checked(torch.device("cpu"))


def test_the_time_out_is_of_loading_too() -> None:
    begin = time.monotonic()
    with pytest.raises(ObjectiveError, match=r"no answer in 0\.1 s"):
        RetryingObjective(Moody([lambda: time.sleep(5)]), timeout=0.1).load_checked(torch.device("cpu"))
    assert time.monotonic() - begin < 3


def test_a_mistake_within_is_a_failure_too() -> None:
    def mistaken() -> None:
        raise UserError("this prompt is too long for the server")

    objective = RetryingObjective(Moody([mistaken] * 2), retries=1, backoff=0.0, on_failure="skip")
    with pytest.warns(UserWarning, match="left out of a batch, after 2 attempts: this prompt is too long"):
        assert torch.tensor(ask(objective, "a")).isnan().all()


def test_what_the_objective_keeps_is_kept() -> None:
    class Counting(Moody):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"calls": self.calls}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.calls = state_dict.get("calls", 0)

    objective, again = RetryingObjective(Counting([])), RetryingObjective(Counting([]))
    ask(objective, "a")
    again.load_state_dict(objective.state_dict())
    assert again.objective.calls == 1
    assert again.normalisation == objective.normalisation


@pytest.mark.slow
def test_a_thread_that_hangs_keeps_no_process() -> None:
    code = (
        "import time, torch; from miepo.objectives import Objective; from miepo.objectives.scoring import start_scoring\n"
        "class Hangs(Objective):\n"
        "    concurrent = True\n"
        "    def score(self, prompts, responses): time.sleep(100)\n"
        "start_scoring([Hangs()], ['x'], [['y']])\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_run_goes_on_without_it_and_counts(tiny_model: Path, tmp_path: Path) -> None:
    """Its pairs have no label; the others' have."""
    inner = Moody([lambda: None] * 2 + [fails] * 2)  # loaded, then down for the first rollout
    objectives = [RetryingObjective(inner, retries=1, backoff=0.0, on_failure="skip"), Length()]
    with pytest.warns(UserWarning, match="moody is left out of a batch, after 2 attempts"):
        module, batch, logged = rollout(tiny_model, tmp_path, objectives=objectives, trainer={"max_steps": 2})
    assert logged["count/failed/moody"] == 1
    assert batch.scores[..., 0].isnan().all()
    assert (batch.labels[:, 0] == 0).all()
    assert (batch.labels[:, 1] != 0).any()
    loss, gradients = step(module, batch)
    assert loss.isfinite()
    assert any(g.abs().sum() > 0 for g in gradients.values())


def test_an_evaluation_counts_what_was_left_out_of_it(tiny_model: Path, tmp_path: Path) -> None:
    inner = Moody([lambda: None, fails, lambda: None, fails])  # loaded; down in the first and the third batch
    objectives = [
        RetryingObjective(inner, retries=0, on_failure="skip"),
        Letters("e", normalisation={"mean": 0.0, "sd": 1.0}),
    ]
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, objectives=objectives, data={"grid": 3, "evaluation_batch_size": 2},
        trainer={"limit_val_batches": 1.0},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="moody is left out of a batch"):
        (found,) = trainer.validate(module, data, verbose=False)
    assert found["count/failed/moody"] == 2


def test_infinite_scores_are_none(tiny_model: Path, tmp_path: Path) -> None:
    inner = Moody([lambda: None, lambda: [float("inf"), -float("inf")] * 4])
    inner.has_scored = True  # before
    _, batch, logged = rollout(
        tiny_model, tmp_path, objectives=[inner, Letters("e", normalisation={"mean": 0.0, "sd": 1.0})]
    )
    assert batch.scores[..., 0].isnan().all()
    assert logged["count/not_a_number"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0.0}, "broken: timeout must be positive, got 0"),
        ({"retries": -1}, "broken: retries must not be negative, got -1"),
        ({"backoff": -0.5}, "broken: backoff must not be negative"),
        ({"on_failure": "ignore"}, "broken: on_failure must be error or skip, got 'ignore'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetryingObjective(Broken(), **settings)
