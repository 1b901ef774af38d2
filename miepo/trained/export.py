"""``miepo export``: a trained policy as files that Transformers, PEFT and vLLM load without miepo.

For one preference an adapter, or a whole model, that follows it: a gate is multiplied into the columns of B, and text
that states the preference becomes part of the chat template. For the whole simplex the adapter with a card that says
how a preference acts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from miepo.errors import UserError, first_line
from miepo.policy import Policy
from miepo.policy.base_model import base_folder
from miepo.policy.policy import ADAPTER, rounding_note
from miepo.preferences import parse_preference
from miepo.trained.build import build_policy
from miepo.trained.chat_template import _literal, chat_template, preference_expression
from miepo.trained.model_card import model_card
from miepo.trained.saved import Saved
from miepo.vllm.request import CARD


def block_owners(policy: Policy) -> list[str | None]:
    """Return the objective of each rank block, None for one that every preference uses."""
    corners = torch.eye(len(policy.names))
    owners: list[str | None] = []
    for conditioning in policy.conditioning:
        if count := conditioning.blocks(len(policy.names)):
            gates = conditioning.gate(corners)  # (K, blocks)
            for block in range(count):
                column = gates[:, block]
                matches = [n for k, n in enumerate(policy.names) if torch.equal(column, corners[k])]
                if not matches and not torch.equal(column, torch.ones_like(column)):
                    raise UserError(
                        f"{type(conditioning).__name__} gates in a way of its own: expected a --preference to export"
                    )
                owners.append(matches[0] if matches else None)
    return owners


def export(
    saved: Saved,
    folder: Path,
    preference: Mapping[str, float] | None = None,
    merged: bool = False,
    trust: bool = False,
    base: str | None = None,
) -> Path:
    """Write a trained policy into a new folder.

    Args:
        saved: From :meth:`Saved.read`.
        folder: That does not exist, or is empty.
        preference: Weights by objective name; without them the adapter serves the whole simplex.
        merged: A complete model in place of an adapter; needs a preference.
        trust: As of :func:`miepo.load`.
        base: Where the base model is now, if it has moved.

    Raises:
        UserError: the folder is not empty, or the policy cannot be exported so.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"expected a new or empty folder to export to, got '{folder}'")
    if merged and preference is None:
        raise UserError("a merged model follows one preference: expected --preference, got none")
    vector = None if preference is None else parse_preference(preference, saved.names, strict=True)
    if not saved.names:
        raise UserError(f"'{saved.source}' has no objectives: it is of a stage without preferences")
    folder = folder.absolute()
    is_there = folder.is_dir()
    place = folder if is_there else folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".miepo-", dir=place) as beside:
            partial = Path(beside) / "export"
            _write(saved, vector, merged, build_policy(saved, {"base": base}, trust).eval(), partial)
            if is_there:  # a shell may be in it, or a volume be mounted there
                for path in partial.iterdir():
                    path.replace(folder / path.name)
            else:
                partial.replace(folder)  # a folder of this name is whole
    except OSError as error:
        raise UserError(f"expected a folder to export to that can be written, got {first_line(error)}") from None
    return folder


def _write(saved: Saved, vector: Tensor | None, merged: bool, policy: Policy, folder: Path) -> None:
    """Write all files of an export into a folder that is not there yet."""
    owners: list[str | None] = []
    if vector is None:
        text, owners = preference_expression(policy), block_owners(policy)
        if owners:  # so that the adapter as it is follows equal weights, and not all of them at once
            policy.scale_blocks(block_factors(owners, len(saved.names)).repeat_interleave(policy.lora_rank))
    else:
        text = _literal(policy.preference_text(vector.tolist()))
        gate = policy.gate_of(vector.unsqueeze(0))
        if gate is not None:
            policy.scale_blocks(gate[0])
    policy.tokenizer.chat_template = chat_template(policy, text, free=vector is None)
    remaining = 1.0  # of what was trained
    if merged:
        remaining = policy.save_merged(folder)
        if note := rounding_note(remaining):
            rank_zero_warn(f"{note}: the merged model is not quite the policy, the adapter (without --merged) is")
    else:
        folder.mkdir()
        config: Any = policy.model.peft_config[ADAPTER]
        where = base_folder(policy.base)
        where = str(Path(where).resolve()) if Path(where).exists() else where  # from wherever it is loaded
        config.base_model_name_or_path, config.inference_mode = where, True
        policy.save_adapter(folder)
        policy.tokenizer.save_pretrained(folder)
        policy.causal_lm.generation_config.save_pretrained(folder)
    if vector is None:
        _write_card(saved, owners, policy, folder)
    if saved.front is not None:
        saved.front.draw().savefig(folder / "front.png", dpi=120)
    model_card(saved, vector, merged, remaining).save(folder / "README.md")


def block_factors(owners: Sequence[str | None], objectives: int) -> Tensor:
    """Return what the blocks are multiplied by under equal weights, ``(blocks,)``."""
    return torch.tensor([1.0 if owner is None else 1 / objectives for owner in owners])


def _write_card(saved: Saved, owners: Sequence[str | None], policy: Policy, folder: Path) -> None:
    rank, k = policy.lora_rank, len(saved.names)
    card = {key: value for key, value in vars(saved).items() if key not in ("source", "adapter")}
    card["evaluations"] = [evaluation.state() for evaluation in saved.evaluations]
    card["blocks"] = [
        {
            "columns": [i * rank, (i + 1) * rank],
            "objective": owner,
            "factor": 1 if owner is None else f"{k} * weight of {owner}",
        }
        for i, owner in enumerate(owners)
    ]
    card["writes"] = policy.reference_depends_on_preference  # in prompts, by the chat template
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
