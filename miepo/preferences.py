"""Preference vectors: how they are drawn, which ones are evaluated, how a user writes one."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isfinite
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from miepo.errors import UserError, short
from miepo.recorded import Recorded
from miepo.seeding import RandomStream, generator

ROUNDING = 1e-3  # of a sum of weights that a user writes
# K = 3: the 13 representative vectors of the helpful-assistant task (corners, lattice points, centre).
_REPRESENTATIVE_3 = [
    (1, 0, 0), (0, 1, 0), (0, 0, 1),
    (0.1, 0.1, 0.8), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1),
    (0.2, 0.2, 0.6), (0.2, 0.6, 0.2), (0.6, 0.2, 0.2),
    (0.2, 0.4, 0.4), (0.4, 0.4, 0.2), (0.4, 0.2, 0.4),
    (1 / 3, 1 / 3, 1 / 3),
]  # fmt: skip


class PreferenceSampler(Recorded, ABC):
    """A distribution over the simplex from which w+ and w- are drawn."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int, objectives: int) -> np.ndarray:
        """Return ``count`` independent preference vectors, ``(count, K)`` float64."""


class DirichletPreferences(PreferenceSampler):
    """Dirichlet(alpha), as in Algorithm 1.

    Args:
        alpha: One positive concentration for all objectives, or one for each. The paper uses 0.5 for safe alignment
            and 1.0 for the helpful assistant.
    """

    def __init__(self, alpha: float | list[float] = 1.0) -> None:
        self.alpha = alpha
        values = alpha if isinstance(alpha, list) else [alpha]
        if not values or any(not isfinite(a) or a <= 0 for a in values):
            raise UserError(f"DirichletPreferences.alpha must be positive, got {alpha}")

    def draw(self, rng: np.random.Generator, count: int, objectives: int) -> np.ndarray:
        alpha = self.alpha if isinstance(self.alpha, list) else [self.alpha] * objectives
        if len(alpha) != objectives:
            raise UserError(
                f"DirichletPreferences.alpha has {len(alpha)} entries, but there are {objectives} objectives"
            )
        return rng.dirichlet(alpha, size=count)


class CornerPreferences(PreferenceSampler):
    """One-hot vectors, each objective equally likely: with a gate without its shared block, Rewarded Soups' experts."""

    def draw(self, rng: np.random.Generator, count: int, objectives: int) -> np.ndarray:
        return np.eye(objectives)[rng.integers(objectives, size=count)]


def draw_preferences(
    sampler: PreferenceSampler,
    seed: int,
    epochs: Sequence[int],
    positions: Sequence[int],
    counterfactuals: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return w+ ``(B, K)`` and w- ``(B, C, K)`` for prompts at the given places of a run (Algorithm 1, 1)."""
    rows = [
        sampler.draw(generator(RandomStream.PREFERENCE, seed, e, p), 1 + counterfactuals, k)
        for e, p in zip(epochs, positions, strict=True)
    ]
    drawn = torch.from_numpy(np.stack(rows)).float()  # (B, 1 + C, K)
    return drawn[:, 0], drawn[:, 1:]


def routing_draws(seed: int, epochs: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Return what the router draws with, uniform in [0, 1) and independent of the preferences: ``(B,)`` float64."""
    draws = [generator(RandomStream.ROUTING, seed, *place).random() for place in zip(epochs, positions, strict=True)]
    return torch.tensor(draws, dtype=torch.float64)


def evaluation_grid(objectives: int, points: int | None = None) -> Tensor:
    """Return preference vectors ``(M, K)`` for evaluation.

    Without ``points``: 11 for K = 2, the 13 representative vectors for K = 3 (the paper's grids), and for K > 3 the
    corners, the edge midpoints and the centre. With ``points``: K = 2 takes that many equal steps; K > 2 takes the
    densest simplex lattice that has at most that many vectors.
    """
    if objectives == 1:
        return torch.ones(1, 1)
    if objectives == 2:
        first = torch.linspace(0, 1, 11 if points is None else points, dtype=torch.float64)
        return torch.stack([first, 1 - first], 1).float()
    if points is None:
        if objectives == 3:
            return torch.tensor(_REPRESENTATIVE_3)
        edges = [
            (torch.eye(objectives)[i] + torch.eye(objectives)[j]) / 2 for i, j in combinations(range(objectives), 2)
        ]
        return torch.cat([torch.eye(objectives), torch.stack(edges), torch.full((1, objectives), 1 / objectives)])
    lattice = _lattice(objectives, 1)
    divisions = 2
    while len(finer := _lattice(objectives, divisions)) <= points:
        lattice, divisions = finer, divisions + 1
    if len(lattice) > points:
        raise UserError(
            f"an evaluation grid for {objectives} objectives needs at least {objectives} points, got {points}"
        )
    return torch.from_numpy(lattice).float()


def _lattice(objectives: int, divisions: int) -> np.ndarray:
    """Return all vectors whose entries are multiples of ``1 / divisions`` (stars and bars), ``(M, K)``."""
    bars = np.array(list(combinations(range(divisions + objectives - 1), objectives - 1)))
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), divisions + objectives - 1)], 1)
    return (np.diff(edges, axis=1) - 1) / divisions


def simplex_rows(rows: Sequence[Sequence[float]], objectives: int, where: str) -> Tensor:
    """Return preference vectors given as lists of numbers, checked and normalised, ``(M, K)``."""
    names = [str(k) for k in range(objectives)]
    if not rows:
        raise UserError(f"{where}: expected at least one preference vector, got none")
    for row in rows:
        if not isinstance(row, (list, tuple)):
            raise UserError(f"{where}: a preference vector is a list of {objectives} weights, got {short(row)}")
        if len(row) != objectives:
            raise UserError(f"{where}: a preference vector needs {objectives} weights, got {list(row)}")
    return torch.stack([parse_preference(dict(zip(names, row, strict=True)), names, where) for row in rows])


def parse_preference(
    weights: Mapping[str, float], names: Sequence[str], where: str = "preference", strict: bool = False
) -> Tensor:
    """Return a preference vector ``(K,)`` from weights by objective name; objectives not named weigh nothing.

    Weights that do not sum to 1 are normalised with a warning; with ``strict`` they are refused, but for rounding.

    Raises:
        UserError: an unknown name, a weight that is negative or not a number, or no positive weight.
    """
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UserError(
            f"{where}: unknown objective {', '.join(map(str, unknown))}; the objectives are {', '.join(names)}"
        )
    for name, weight in weights.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not -1e9 <= weight <= 1e9:  # NaN lies between nothing
            raise UserError(f"{where}: the weight of {name} must be a number, got {short(weight)}")
        if weight < 0:
            raise UserError(f"{where}: the weight of {name} must not be negative, got {weight}")
    weights = {name: float(weight) for name, weight in weights.items()}
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{where}: at least one weight must be positive, got {dict(weights)}")
    if strict and abs(total - 1) > ROUNDING:
        raise UserError(f"{where}: expected weights that sum to 1, got a sum of {total:g}")
    if abs(total - 1) > (ROUNDING if strict else 1e-6):
        warnings.warn(f"{where}: the weights sum to {total:g}, not 1; they are normalised", stacklevel=2)
    shares = [weights.get(name, 0.0) / total + 0.0 for name in names]  # without a minus before a zero
    return torch.tensor(shares, dtype=torch.float32)


def format_preference(preference: Tensor, names: Sequence[str]) -> str:
    """Return a preference vector as people read it: ``'cheerful 0.25, brief 0.75'``."""
    return ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, preference.tolist(), strict=True))
