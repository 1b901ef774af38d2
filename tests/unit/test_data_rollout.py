"""The rollout as a function: no Trainer, no data module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miepo.data.rollout import Learner, RolloutSettings, evaluate, roll_out
from miepo.errors import UserError
from miepo.exploration import InfoNCE
from miepo.policy import GatedConditioning
from miepo.preferences import CornerPreferences
from miepo.router import ExpectationRouter
from miepo.types import PromptBatch
from tests.helpers.tiny import Length, Letters, tiny_policy

PROMPTS = PromptBatch(["the garden", "food"], [0, 0], [0, 1])
SETTINGS = RolloutSettings(CornerPreferences(), max_new_tokens=6, seed=3)
NORMALISED = {"mean": 0.0, "sd": 1.0}


@pytest.fixture
def learner(tiny_model: Path) -> Learner:
    objectives = [Letters("e", normalisation=NORMALISED), Length("length")]
    objectives[1].calibrate(torch.tensor([0.0, 5.0]))
    for objective in objectives:
        objective.load_checked(torch.device("cpu"))
    policy = tiny_policy(tiny_model, [GatedConditioning()])
    return Learner(policy, objectives, ExpectationRouter(), InfoNCE(0.1))


def test_a_rollout_needs_no_trainer(learner: Learner) -> None:
    batch = roll_out(PROMPTS, learner, SETTINGS)
    assert batch.scores.shape == (2, 2, 2)
    assert batch.counterfactual.shape == (2, 1, 2)
    assert batch.preferences.shape == (2, 2, 2)
    assert torch.equal(batch.preferences[:, 0], batch.preference)
    assert batch.preference.max(-1).values.eq(1).all()  # corners
    assert batch.compared.all()
    again = roll_out(PROMPTS, learner, SETTINGS)
    assert again.responses.texts == batch.responses.texts  # a function of its arguments
    assert roll_out(PROMPTS, learner, replace(SETTINGS, seed=4)).responses.texts != batch.responses.texts


def test_without_an_exploration_term_no_counterfactual_is_drawn(learner: Learner) -> None:
    batch = roll_out(PROMPTS, replace(learner, exploration=None), SETTINGS)
    assert batch.counterfactual.shape == (2, 0, 2)
    assert batch.read_under.shape == (2, 2, 1)


def test_scoring_goes_through_what_calls_it_on_all_processes(learner: Learner) -> None:
    calls: list[int] = []
    roll_out(PROMPTS, learner, SETTINGS, lambda score: (calls.append(1), score())[1])
    assert calls == [1]


def test_an_evaluation_is_scored_where_there_are_objectives(learner: Learner) -> None:
    prompts = replace(PROMPTS, grid_index=torch.tensor([0, 1]), preference=torch.eye(2))
    scored = evaluate(prompts, learner.policy, learner.objectives, SETTINGS)
    assert scored.scores is not None
    assert scored.scores.shape == (2, 2)
    plain = evaluate(prompts, learner.policy, [], SETTINGS)
    assert plain.scores is None
    assert plain.responses.texts == scored.responses.texts


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("responses", 1, "data.responses must be at least 2, got 1"),
        ("max_new_tokens", 0, "data.max_new_tokens must be at least 1, got 0"),
        ("missing_eos_penalty", float("nan"), "data.missing_eos_penalty must not be negative, got nan"),
    ],
)
def test_settings_out_of_range(setting: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutSettings(**{setting: value})
