"""``miepo export``: a trained policy as files that Transformers, PEFT and vLLM load without miepo.

For one preference an adapter, or a whole model, that follows it: a gate is multiplied into the columns of B, and text
that states the preference becomes part of the chat template. For the whole simplex the adapter with a card that says
how a preference acts.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from miepo.callbacks.evaluation_table import obedience, table_rows
from miepo.errors import UserError, first_line
from miepo.policy import Policy, PromptConditioning
from miepo.policy.base_model import base_folder
from miepo.policy.policy import ADAPTER, rounding_note
from miepo.preferences import ROUNDING, format_preference, parse_preference
from miepo.trained import CARD, Saved, build_policy

# -- the chat template -------------------------------------------------------------------------------------------------


# messages whose content may come in parts, as one text each
TEXT_OF_PARTS = """\
{%- set all = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- if m['content'] is string or m['content'] is none -%}
{%- set all.messages = all.messages + [m] -%}
{%- elif m['content'] | rejectattr('type', 'equalto', 'text') | list -%}
{{- raise_exception('this model reads text alone') -}}
{%- else -%}
{%- set all.messages = all.messages + [dict(m, content=m['content'] | map(attribute='text') | join)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = all.messages -%}
"""
# refuses what parse_preference does
WEIGHTS = """\
{%%- for name, weight in (preference or {}).items() -%%}
{%%- if name not in [%(names)s] -%%}
{{- raise_exception('unknown objective ' ~ name ~ '; the objectives are ' ~ %(said)s) -}}
{%%- elif weight is not number or weight is boolean or not 0 <= weight <= 1e9 -%%}
{{- raise_exception('the weight of ' ~ name ~ ' must be a number that is not negative, got ' ~ weight) -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if preference and ((preference.values() | sum) - 1) | abs > %(rounding)s -%%}
{{- raise_exception('expected weights that sum to 1, got a sum of ' ~ (preference.values() | sum)) -}}
{%%- endif -%%}
"""


def chat_template(policy: Policy, text: str, free: bool = False) -> str:
    """A Jinja chat template that writes what the policy reads.

    Args:
        policy: Whose prompt template it is.
        text: A Jinja expression of the text that states the preference, after that of the last message.
        free: Whether ``text`` is of any ``preference``, which is checked then.
    """
    template = policy.template
    head = TEXT_OF_PARTS
    if free:
        names = ", ".join(_literal(name) for name in policy.names)
        head += WEIGHTS % {"names": names, "said": _literal(", ".join(policy.names)), "rounding": ROUNDING}
    start = policy.tokenizer.decode(template.start)  # what the tokenizer alone would put in front
    if template.chat:
        original = policy.tokenizer.chat_template
        if isinstance(original, dict):  # by name
            original = original["default"]
        thinking = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
        return (
            head
            + (f"{{{{- {_literal(start)} -}}}}" if start else "")
            + (thinking if "enable_thinking" in original else "")
            + "{%- if messages[-1]['role'] == 'user' -%}{%- set messages = messages[:-1] + "
            f"[dict(messages[-1], content=messages[-1]['content'] + ({text}))] -%}}{{%- endif -%}}{original}"
        )
    prefix, suffix = _literal(start + template.prefix), _literal(template.suffix)
    if template.dialogue:
        turns = (
            "{%- for m in messages -%}{%- if m['role'] not in ['user', 'assistant'] -%}"
            "{{- raise_exception('this model reads messages of user and assistant, got ' ~ m['role']) -}}{%- endif -%}"
            "{{- '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant'}[m['role']] + ': ' + m['content'] -}}"
            "{%- endfor -%}"
        )
        return f"{head}{{{{- {prefix} -}}}}{turns}{{{{- ({text}) + {suffix} -}}}}"
    one = "{{- raise_exception('this model answers one message at a time') -}}"
    return (
        f"{head}{{%- if messages | length != 1 -%}}{one}{{%- endif -%}}"
        f"{{{{- {prefix} + messages[0]['content'] + ({text}) + {suffix} -}}}}"
    )


def _literal(text: str) -> str:
    """A Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r").replace("\n", "\\n") + "'"


def preference_expression(policy: Policy) -> str:
    """The text of any preference as a Jinja expression of ``preference``, weights by name; equal weights without it.

    Raises:
        UserError: a conditioning writes in a way of its own.
    """
    names, parts = policy.names, []
    for conditioning in policy.conditioning:
        if type(conditioning) is PromptConditioning:
            for name in names:
                weight = f"(preference or {{}}).get({_literal(name)}, 0 if preference else {1 / len(names)!r})"
                form = f"'%.{conditioning.decimals}f'"
                parts += [
                    _literal(f" <{name}> "),
                    f"({form} | format({weight} | float | round({conditioning.digits})))",
                ]
        elif conditioning.write([1 / len(names)] * len(names), names):
            raise UserError(
                f"{type(conditioning).__name__} cannot be written as a template for every preference: "
                "expected a --preference to export, got none"
            )
    return " + ".join(parts) or "''"


# -- what is written ---------------------------------------------------------------------------------------------------


def block_owners(policy: Policy) -> list[str | None]:
    """The objective of each rank block, None for one that every preference uses."""
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
    """Writes a trained policy into a new folder.

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
    """Writes all files of an export into a folder that is not there yet."""
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
    kept = 1.0  # of what was trained
    if merged:
        kept = policy.save_merged(folder)
        if note := rounding_note(kept):
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
    model_card(saved, vector, merged, kept).save(folder / "README.md")


def block_factors(owners: Sequence[str | None], objectives: int) -> Tensor:
    """What the blocks are multiplied by under equal weights, ``(blocks,)``."""
    return torch.tensor([1.0 if owner is None else 1 / objectives for owner in owners])


def _write_card(saved: Saved, owners: Sequence[str | None], policy: Policy, folder: Path) -> None:
    rank, k = policy.lora_rank, len(saved.names)
    card = {key: value for key, value in vars(saved).items() if key not in ("source", "adapter", "front")}
    card["front"] = None
    if saved.front is not None:
        front = saved.front
        before = None if front.before is None else front.before.tolist()
        card["front"] = {"grid": front.grid.tolist(), "after": front.means.tolist(), "before": before}
    card["blocks"] = [
        {
            "columns": [i * rank, (i + 1) * rank],
            "objective": owner,
            "factor": 1 if owner is None else f"{k} * weight of {owner}",
        }
        for i, owner in enumerate(owners)
    ]
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def method_of(settings: Mapping[str, Any]) -> str:
    """The method in words, from what a run keeps of its settings."""
    if str(settings.get("method")).endswith("RewardsInContext"):
        return "Rewards-in-Context (arXiv 2402.10207)"
    term = (settings.get("model") or {}).get("exploration")
    if not isinstance(term, dict):
        return "a method that its settings below name"
    given = term.get("init_args") or {}
    if 0 in (given.get("beta_w", 1), given.get("weight", 1)):
        return "MO-ODPO (online DPO under drawn preferences, no exploration term)"
    return f"MI-EPO (arXiv 2607.01392), exploration term {str(term.get('class_path')).rpartition('.')[2]}"


def model_card(saved: Saved, preference: Tensor | None, merged: bool, kept: float = 1.0) -> ModelCard:
    """What the model is, how it is used, what was measured and how it was trained."""
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
    if rounding_note(kept):
        parts.append(f"Rounding to the type of the weights has left {100 * kept:.0f} % of what was trained.")
    if columns := list(saved.evaluations.values()):
        head = ["metric", *(f"step {column['step']}" for column in columns)]
        rows = [head, ["---"] * len(head), *table_rows(columns)]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        parts += ["## Measured", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
        if said := obedience(columns[-1]["metrics"], saved.names):
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


# -- the command -------------------------------------------------------------------------------------------------------


def main(args: Sequence[str]) -> None:
    """``miepo export --ckpt_path RUN --out FOLDER [--preference JSON] [--merged]``."""
    parser = ArgumentParser(
        prog="miepo export",
        description="Writes a trained policy as a PEFT adapter or a whole model, which need no miepo.",
    )
    parser.add_argument("--ckpt_path", required=True, help="a run's folder or a checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--preference", help="weights by objective name as JSON; without it, the whole simplex")
    parser.add_argument("--merged", action="store_true", help="a complete model in place of an adapter")
    parser.add_argument("--base", help="where the base model is, if not where it was in training")
    parser.add_argument("--trust", action="store_true", help="import code that the checkpoint names and miepo has not")
    options = parser.parse_args(args)
    preference = None if options.preference is None else read_preference(options.preference)
    saved = Saved.read(options.ckpt_path)
    folder = export(saved, options.out, preference, options.merged, options.trust, options.base)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Exported {size / 1e6:.1f} MB: {folder}")


def read_preference(text: str) -> dict[str, float]:
    """Weights by objective name from a command line's JSON."""
    try:
        weights = json.loads(text)
    except ValueError:
        weights = None
    if not isinstance(weights, dict):
        raise UserError(f'expected a preference such as \'{{"helpful": 0.7, "brief": 0.3}}\', got {text!r}')
    return weights
