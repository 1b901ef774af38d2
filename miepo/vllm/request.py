"""How a request carries a preference: in the model's name, in its body, and as the gate that a LoRA layer applies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

from miepo.errors import UserError, first_line, short
from miepo.preferences import parse_preference

GATE = "miepo_gate"  # in vllm_xargs, which vLLM hands on to where the LoRA layers are
CARD = "miepo.json"  # in a folder of miepo export: what the adapter means
SEPARATOR = "@"


def split_name(name: str) -> tuple[str, dict[str, float] | None]:
    """Return the model and the weights that a name states, if it does.

    >>> split_name("answers@relevance=0.2,brevity=0.8")
    ('answers', {'relevance': 0.2, 'brevity': 0.8})
    >>> split_name("answers")
    ('answers', None)

    Raises:
        UserError: after the separator there are no weights.
    """
    model, separator, stated = name.rpartition(SEPARATOR)
    if not separator:
        return name, None
    weights = {}
    for part in stated.split(","):
        objective, _, weight = part.partition("=")
        try:
            weights[objective.strip()] = float(weight)
        except ValueError:
            raise UserError(f"expected a model such as {model}@first=0.2,second=0.8, got {short(name)}") from None
    return model, weights


def gate_fields(gate: Sequence[float], salt: str | None = None) -> dict[str, Any]:
    """Return what a request to vLLM says besides, so that its adapter is gated.

    Args:
        gate: The factor of each rank block, ``(blocks,)``.
        salt: That the request had already. Blocks of the prefix cache are found by it: under another gate the same
            tokens have other states.
    """
    values = [float(factor) for factor in gate]
    return {
        "vllm_xargs": {GATE: values},
        "cache_salt": sha256(json.dumps([values, salt]).encode()).hexdigest(),
    }


class Card:
    """What a folder of ``miepo export`` says of a preference.

    Args:
        folder: Of an export for the whole simplex.

    Raises:
        UserError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        try:
            content = json.loads((folder / CARD).read_text(encoding="utf-8"))
            self.names = tuple(map(str, content["names"]))
            self.owners = [block["objective"] for block in content["blocks"]]
            self.columns = [tuple(map(int, block["columns"])) for block in content["blocks"]]
            self.base = str(content["base"])
            self.rank = int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"expected a policy of miepo export for every preference in '{folder}', got another: "
                f"{first_line(error)}"
            ) from None
        template = folder / "chat_template.jinja"
        stated = template.is_file() and "(preference or {}).get(" in template.read_text(encoding="utf-8")
        self.writes = bool(content.get("writes", stated))  # older exports do not say

    def weights(self, stated: Any) -> dict[str, float]:
        """Return the weight of every objective.

        Raises:
            UserError: ``stated`` is no preference of this policy.
        """
        if not isinstance(stated, Mapping):
            raise UserError(f"preference: expected weights by objective, such as {{{self.names[0]!r}: 1.0}}")
        vector = parse_preference(stated, self.names, strict=True)
        return dict(zip(self.names, vector.double().tolist(), strict=True))

    def gate(self, weights: Mapping[str, float]) -> list[float]:
        """Return what multiplies each rank block as it lies in the folder, where the adapter follows equal weights."""
        return [1.0 if owner is None else len(self.names) * weights[owner] for owner in self.owners]


def gate_in(extra: Mapping[str, Any] | None) -> list[float] | None:
    """Return the gate among the extra arguments of a request, None where there is none.

    Raises:
        ValueError: it is not a list of finite numbers.
    """
    gate = (extra or {}).get(GATE)
    if gate is None:
        return None
    if not isinstance(gate, (list, tuple)) or not gate or not all(_finite(factor) for factor in gate):
        raise ValueError(f"expected {GATE} to be a list of numbers, got {short(gate)}")
    return [float(factor) for factor in gate]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
