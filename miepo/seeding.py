"""Random numbers as pure functions of a seed and a place in the run."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral
from typing import Any

import numpy as np

from miepo.errors import UserError


class RandomStream(IntEnum):
    """Names of the independent random streams that one seed feeds."""

    SHUFFLE = 0
    PREFERENCE = 1
    ROUTING = 2
    SAMPLING = 3
    CALIBRATION = 4
    EVALUATION = 5
    BOOTSTRAP = 6
    SPLIT = 7
    ANCHOR = 8
    DROPOUT = 9


def generator(stream: RandomStream, *position: int) -> np.random.Generator:
    """Return a generator that is a pure function of its arguments (seed first, then epoch, index, ...)."""
    return np.random.default_rng([int(stream), *(int(p) for p in position)])


def torch_seed(stream: RandomStream, *position: int) -> int:
    """Return a seed for torch's generators, a pure function of its arguments."""
    return int(generator(stream, *position).integers(2**63))


def torch_seeds(stream: RandomStream, seed: int, *positions: Sequence[int]) -> list[int]:
    """Return one for each place, given as columns: epochs and positions, say."""
    return [torch_seed(stream, seed, *place) for place in zip(*positions, strict=True)]

    pass


def check_seed(seed: Any) -> None:
    """Raise UserError where ``seed`` is none."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise UserError(f"seed must not be negative, a whole number, got {seed!r}")


def prompt_seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    """Return one seed for each prompt."""
    if not isinstance(seed, Sequence):
        check_seed(seed)
        return [int(s) for s in np.random.SeedSequence(int(seed)).generate_state(prompts, np.uint64) >> np.uint64(2)]
    if len(seed) != prompts:
        raise ValueError(f"expected a seed for each of {prompts} prompts, got {len(seed)}")
    return list(seed)
