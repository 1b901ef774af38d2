"""What objects remember of their construction, and how a configuration states it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miepo import MIEPO, OnlinePreferenceDataModule
from miepo.methods import RewardsInContextDataModule
from miepo.objectives import Objective, PythonObjective
from miepo.policy import GatedConditioning, Policy
from miepo.preferences import CornerPreferences, DirichletPreferences
from miepo.recorded import Recorded, specification


class Thing(Recorded):
    def __init__(self, a: int, *, b: Any = (1, 2), **rest: Any) -> None:
        self.a, self.b, self.rest = a, b, rest


class Warm(Objective):
    def __init__(self, words: list[str], name: str = "warm") -> None:
        super().__init__(name)
        self.words = words

    def score(self, prompts, responses):
        return [0.0] * len(prompts)


def test_arguments_by_name_with_defaults() -> None:
    thing = Thing(3, c=4)
    assert thing.built_with == {"a": 3, "b": (1, 2), "c": 4}
    assert copy.deepcopy(thing).built_with == thing.built_with
    assert pickle.loads(pickle.dumps(thing)).built_with == thing.built_with
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Thing()  # type: ignore[call-arg]


def test_a_specification_is_plain_data() -> None:
    nested = Thing(np.int64(3), b={"x": [Thing(1)]}, file=Path("a/b"), kind=torch.Tensor, function=specification)
    arguments = specification(nested)["init_args"]
    assert arguments["a"] == 3
    assert type(arguments["a"]) is int
    assert arguments["b"]["x"][0]["init_args"]["a"] == 1
    assert arguments["file"] == "a/b"
    assert arguments["kind"] == "torch.Tensor"
    assert arguments["function"] == "miepo.recorded.specification"
    assert specification(object()) == "builtins.object"
    assert specification(np.float32(0.5)) == 0.5


def test_policies_objectives_and_data_are_stated_with_all_they_are_made_of() -> None:
    policy = Policy("base", [GatedConditioning(shared=False)], lora_rank=4)
    stated = specification(policy)
    assert stated["class_path"] == "miepo.policy.policy.Policy"
    assert stated["init_args"]["lora_rank"] == 4
    assert stated["init_args"]["lora_alpha"] == 128  # a default
    assert stated["init_args"]["conditioning"] == [
        {"class_path": "miepo.policy.conditioning.GatedConditioning", "init_args": {"shared": False}}
    ]
    assert policy.conditioning[0].attributes == {"shared": False}
    data = specification(OnlinePreferenceDataModule(["a", "b"], preferences=CornerPreferences(), batch_size=2))
    assert data["init_args"]["preferences"] == {"class_path": "miepo.preferences.CornerPreferences", "init_args": {}}
    ric = specification(RewardsInContextDataModule(offline=0.5, prompts=["a", "b"], batch_size=3))
    assert ric["init_args"]["batch_size"] == 3  # of **kwargs
    assert specification(DirichletPreferences([1.0, 2.0]))["init_args"] == {"alpha": [1.0, 2.0]}
    warm = specification(Warm(["kind"]))
    assert warm["class_path"].endswith("test_recorded.Warm")
    assert warm["init_args"] == {"words": ["kind"], "name": "warm"}
    assert specification(PythonObjective("math.dist"))["init_args"]["function"]


class Damped(MIEPO):
    """Passes on what it does not know, as a user's subclass may."""

    def __init__(self, *args: Any, damping: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.damping = damping


def test_arguments_that_are_passed_on_by_position_have_the_names_of_the_class_behind() -> None:
    policy = Policy("somewhere", [GatedConditioning()])
    module = Damped(policy, None, 0.2, damping=0.3, learning_rate=0.5)
    assert module.built_with["policy"] is policy
    assert {key: module.built_with[key] for key in ("beta_c", "damping", "learning_rate", "warmup")} == {
        "beta_c": 0.2, "damping": 0.3, "learning_rate": 0.5, "warmup": 0.1,
    }  # fmt: skip
    assert Damped(policy=policy).built_with == {"damping": 0.1, "policy": policy}


class Keeps(Recorded):
    """Takes any number of values for itself."""

    def __init__(self, *values: int, scale: float = 1.0) -> None:
        self.values = values


def test_arguments_that_no_class_behind_takes_are_left_out() -> None:
    assert Keeps(1, 2, scale=3.0).built_with == {"scale": 3.0}
