"""An objective from a Python function."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from miepo.errors import ObjectiveError
from miepo.objectives.base import Objective


class PythonObjective(Objective):
    """A function ``f(prompts, responses) -> N numbers``, given by its import path.

    Args:
        function: ``package.module.function`` (or ``module:function``); the command also searches its folder.
        name: Name of the objective; the function's name by default.
        higher_is_better: False turns the sign.
        concurrent: Ask it in a thread of its own, beside other objectives and the reference: for a function that waits,
            for a server say.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    identity = ("module", "attribute")

    def __init__(
        self,
        function: str,
        name: str | None = None,
        higher_is_better: bool = True,
        concurrent: bool = False,
        normalisation: dict[str, float] | None = None,
    ) -> None:
        self.module, _, self.attribute = function.replace(":", ".").rpartition(".")
        super().__init__(name or self.attribute, normalisation)
        self.higher_is_better, self.concurrent = higher_is_better, concurrent

    def load(self, device: torch.device) -> None:
        path = f"{self.module}.{self.attribute}"
        try:
            self.function = getattr(importlib.import_module(self.module), self.attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ObjectiveError(f"objective {self.name}: expected a function at '{path}': {error}") from None
        if not callable(self.function):
            raise ObjectiveError(f"objective {self.name}: expected a function at '{path}', got {self.function!r}")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Sequence[float]:
        return self.function(list(prompts), list(responses))
