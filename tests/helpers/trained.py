"""A trained policy as it is saved, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from miepo.evaluation import MEANS, Evaluation
from miepo.objectives import Brevity
from miepo.policy import Conditioning, Policy
from miepo.recorded import specification
from miepo.trained.build import build_policy
from miepo.trained.policy import TrainedPolicy
from miepo.trained.saved import Saved
from tests.helpers.tiny import Letters, randomise_adapter

NAMES = ("letter_e", "brevity")
GRID = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
OBJECTIVES = [
    {"class_path": "tests.helpers.tiny.Letters", "init_args": {"letter": "e"}},
    {"class_path": "miepo.objectives.Brevity", "init_args": {"characters": 30}},
]


def saved_policy(
    model: Path | str,
    conditioning: Sequence[Conditioning],
    names: tuple[str, ...] = NAMES,
    scale: float = 0.3,
    **settings: Any,
) -> tuple[Saved, Policy]:
    """What a checkpoint would hold, and the policy itself."""
    arguments = {"base": str(model), "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.1, "dtype": "float32"}
    arguments |= {"temperature": 0.8} | settings
    policy = randomise_adapter(Policy(**arguments, conditioning=list(conditioning)).build(names), scale=scale).eval()
    saved = Saved(
        source="somewhere",
        names=names,
        base=str(model),
        fingerprint=policy.fingerprint,
        policy=specification(policy),
        objectives=list(OBJECTIVES),
        normalisations={name: {"mean": -1.0, "sd": 2.0} for name in names},
        adapter={name: p.detach().clone() for name, p in policy.adapter_parameters().items()},
        max_new_tokens=9,
        evaluations=tuple(
            Evaluation(
                step, f"step {step}", names, GRID, {"front/hv": 1.0 + step, "front/mip": 0.25 * step}, {MEANS: means}
            )
            for step, means in ((0, GRID * 0), (8, GRID * 2 - 1))
            if len(names) == 2
        ),
    )
    return saved, policy


def trained_policy(model: Path, conditioning: Sequence[Conditioning], **settings: Any) -> TrainedPolicy:
    saved, _ = saved_policy(model, conditioning, **settings)
    policy = build_policy(saved, {}).eval()
    return TrainedPolicy(saved, policy, torch.device("cpu"), [Letters("e"), Brevity(30)])
