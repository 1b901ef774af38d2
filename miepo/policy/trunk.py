"""The layers below the adapter: what leaves them is the same under every preference and in the reference.

An adapter on the upper layers alone (``lora_layers``) leaves the lower ones as the base has them. Where the preference
acts through the gate, and so is not written in the prompt, their states are a function of the token ids. They need no
gradient, and one pass through them serves the reference, w+ and every w-.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from miepo.policy.prefix_tree import Answers, Packed, Prompts


@dataclass(frozen=True)
class Trunk:
    """States that leave the layers below the adapter, of ``B`` prompts and ``n`` responses to each.

    Attributes:
        states: ``(L, D)`` one sequence after the other.
        starts: ``(B, 1 + n)`` the place of the first token of each prompt, and of each of its responses.
    """

    states: Tensor
    starts: Tensor

    def __getitem__(self, prompts: slice) -> Trunk:
        return Trunk(self.states, self.starts[prompts])

    @classmethod
    def of(cls, states: Tensor, packed: Packed, prompts: int, responses: int) -> Trunk:
        """Make one of the states ``(L, D)`` of trees under one preference, ``responses`` to each of the prompts."""
        first = (packed.token == 0).nonzero().squeeze(1)  # of every sequence that has places
        starts = torch.zeros(prompts * (1 + responses), dtype=torch.long, device=first.device)
        return cls(states, starts.index_copy(0, packed.sequence[first], first).view(prompts, 1 + responses))

    def at(self, packed: Packed) -> Tensor:
        """Return the states of the places of trees of the same prompts and responses, ``(1, L, D)``."""
        return self.states[self.starts.flatten()[packed.sequence] + packed.token].unsqueeze(0)

    @classmethod
    def join(cls, parts: Sequence[Trunk]) -> Trunk:
        """Join the trunks of successive prompts."""
        offsets = accumulate((len(part.states) for part in parts), initial=0)
        starts = [part.starts + offset for part, offset in zip(parts, offsets, strict=False)]
        return cls(torch.cat([part.states for part in parts]), torch.cat(starts))


def without_preferences(prompts: Prompts, responses: Answers) -> tuple[Prompts, Answers]:
    """Return prompts, and all responses that are read under some preference, once each: as under one preference.

    Args:
        prompts: ``B`` prompts, the same under all ``C`` preferences.
        responses: ``n`` to each prompt under each preference, empty where it is not wanted.
    """
    once = [[next((a for a in answers if a), answers[0]) for answers in zip(*each, strict=True)] for each in responses]
    return [under[:1] for under in prompts], [[answers] for answers in once]


def layers_below(body: Any) -> int:
    """Return the number of a network's layers that compute alike whatever the adapter and the mode.

    0 where that is not known: the network is not a list of layers between an embedding and a norm, something else than
    its upper layers is adapted, or there is dropout below them.

    Args:
        body: The network without its head, with its adapter.
    """
    layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        return 0
    place: dict[Any, int] = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    adapted = [place.get(module, 0) for module in body.modules() if isinstance(module, LoraLayer)]
    count = min(adapted, default=0)
    below = [module for module in body.modules() if place.get(module, 0) < count]
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in below)
    attention: float = getattr(body.config, "attention_dropout", 0.0)
    return 0 if drops or attention else count


@contextmanager
def only_layers(body: Any, layers: slice, whole: bool) -> Iterator[None]:
    """Within it, a network has these of its layers alone; and no norm after them, if ``whole`` is False."""
    kept = {name: body._modules[name] for name in ("layers", "norm")}
    body._modules["layers"] = body.layers[layers]
    if not whole:
        body._modules["norm"] = nn.Identity()
    try:
        yield
    finally:
        body._modules.update(kept)
