"""The model card of an exported policy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from miepo.callbacks.evaluation_table import obedience, table_rows
from miepo.policy.policy import rounding_note
from miepo.preferences import format_preference
from miepo.trained.saved import CARD, Saved


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the method in words, from what a run keeps of its settings."""
    if str(settings.get("method")).endswith("RewardsInContext"):
        return "Rewards-in-Context (arXiv 2402.10207)"
    term = (settings.get("model") or {}).get("exploration")
    if not isinstance(term, dict):
        return "a method that its settings below name"
    arguments = term.get("init_args") or {}
    if 0 in (arguments.get("beta_w", 1), arguments.get("weight", 1)):
        return "MO-ODPO (online DPO under drawn preferences, no exploration term)"
    return f"MI-EPO (arXiv 2607.01392), exploration term {str(term.get('class_path')).rpartition('.')[2]}"


def model_card(saved: Saved, preference: Tensor | None, merged: bool, remaining: float = 1.0) -> ModelCard:
    """Return what the model is, how it is used, what was measured and how it was trained."""
    names = ", ".join(saved.names)
    local = re.match(r"[.~/]|pypi:|package:", saved.base) is not None or Path(saved.base).exists()
    data = ModelCardData(
        base_model=None if local else saved.base,
        library_name="transformers" if merged else "peft",
        tags=["miepo", "multi-objective", "preference-optimization", *([] if merged else ["lora"])],
    )
    follows = "any trade-off" if preference is None else f"the preference {format_preference(preference, saved.names)}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A policy that follows {follows}",
        f"Objectives: {names}. Trained with miepo by {method_of(saved.settings)} on the base `{saved.base}`.",
        "## Use",
        _usage(saved, preference, merged),
    ]
    if rounding_note(remaining):
        parts.append(f"Rounding to the type of the weights has left {100 * remaining:.0f} % of what was trained.")
    if saved.evaluations:
        head = ["metric", *(evaluation.title for evaluation in saved.evaluations)]
        rows = [head, ["---"] * len(head), *table_rows([evaluation.figures for evaluation in saved.evaluations])]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        parts += ["## Measured", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
        if said := obedience(saved.evaluations[-1].figures, saved.names):
            parts.append("\n".join(f"- {line}" for line in said))
        by = [f"{name} by mean {n['mean']:.4g}, sd {n['sd']:.4g}" for name, n in saved.normalisations.items()]
        parts.append(f"Rewards are normalised: {'; '.join(by)}. All of the whole simplex, on the run's own prompts.")
    if saved.front is not None:
        parts.append("![The measured front](front.png)")
    settings = dict(saved.settings)
    settings["policy"] = {k: v for k, v in ((saved.policy or {}).get("init_args") or {}).items() if k != "base"}
    parts += ["## Settings", f"```json\n{json.dumps(settings, indent=1)}\n```"]
    return ModelCard("\n\n".join(parts) + "\n")


def _usage(saved: Saved, preference: Tensor | None, merged: bool) -> str:
    if merged:
        lines = ["model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
    else:
        lines = [
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)",
            "model.generation_config = GenerationConfig.from_pretrained(FOLDER)  # PEFT leaves the base's",
        ]
    lines = [*lines, "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
    option = "" if preference is not None else ", preference={" + ", ".join(f'"{n}": ..' for n in saved.names) + "}"
    lines.append(f"tokenizer.apply_chat_template([..], add_generation_prompt=True{option})")
    code = "```python\n" + "\n".join(lines) + "\n```"
    code += "\n\nThe chat template takes users' messages as they are: control tokens in them are read as such."
    if saved.stop:
        code += f" A response ends where one of these texts begins: {', '.join(map(repr, saved.stop))}."
    if not merged:
        code += (
            " Servers take chat template and generation settings from the base model unless they are told of those in "
            "this folder (vLLM: `--chat-template FOLDER/chat_template.jinja`)."
        )
    if preference is not None:
        return code
    return (
        f"{code}\n\nAs it lies here the adapter follows equal weights. For others, `miepo.load(FOLDER)`; or multiply "
        f"the columns of every B as `{CARD}` says (`blocks`). What a prompt says of the preference, the chat template "
        "writes."
    )
