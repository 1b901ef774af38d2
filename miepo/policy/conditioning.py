"""How the preference vector reaches the policy: written in the prompt, gating the adapter, or both."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miepo.errors import UserError
from miepo.recorded import Recorded


class Conditioning(Recorded, ABC):
    """One way for w to act. A policy takes a list of them; each may write text, gate rank blocks, or both."""

    @property
    def attributes(self) -> dict[str, Any]:
        """What makes it the one it is, as checkpoints keep it."""
        return {name: value for name, value in vars(self).items() if name != "built_with"}

    def blocks(self, objectives: int) -> int:
        """Return the number of rank blocks that :meth:`gate` addresses; 0 where the adapter is not gated."""
        return 0

    def gate(self, preference: Tensor) -> Tensor:
        """Return the factor for each rank block, ``(N, K) -> (N, blocks)``."""
        raise NotImplementedError(f"{type(self).__name__} does not gate the adapter")

    def write(self, preference: Sequence[float], names: Sequence[str]) -> str:
        """Return text that follows the prompt's text; empty where nothing is written."""
        return ""

    def markers(self, names: Sequence[str]) -> list[str]:
        """Return strings that only this conditioning may write: they are defused inside a user's prompt."""
        return []


class PromptConditioning(Conditioning):
    """The paper's G(x, w): ``<helpfulness> 0.3 <harmlessness> 0.7`` after the text of the prompt.

    Args:
        decimals: Digits after the point of every weight.
    """

    def __init__(self, decimals: int = 2) -> None:
        if not 0 <= decimals <= 12:
            raise UserError(f"PromptConditioning.decimals must be from 0 to 12, got {decimals}")
        self.decimals = decimals

    def write(self, preference: Sequence[float], names: Sequence[str]) -> str:
        # in two steps, since single precision holds 0.005 as a little less: both precisions read alike
        first, last = self.digits, self.decimals
        return "".join(f" <{n}> {round(w, first):.{last}f}" for n, w in zip(names, preference, strict=True))

    @property
    def digits(self) -> int:
        """Digits after the point that single precision has."""
        return max(6, self.decimals)

    def markers(self, names: Sequence[str]) -> list[str]:
        return [f"<{name}>" for name in names]


class GatedConditioning(Conditioning):
    """Gated LoRA: ``delta W(w) = B_0 A_0 + sum_k w_k B_k A_k``, one adapter whose rank blocks w scales per sample.

    Args:
        shared: Keep the block ``B_0 A_0`` that every preference uses. Without it and with corner preferences the
            adapter is Rewarded Soups with all its experts in one run.
    """

    def __init__(self, shared: bool = True) -> None:
        self.shared = shared

    def blocks(self, objectives: int) -> int:
        return objectives + self.shared

    def gate(self, preference: Tensor) -> Tensor:
        if not self.shared:
            return preference
        return torch.cat([torch.ones_like(preference[:, :1]), preference], -1)
