"""Prompts from a list, a file or a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from miepo.data.reading import read_rows
from miepo.errors import UserError
from miepo.seeding import RandomStream, generator
from miepo.text import check_text, dialogue_of

Row = TypeVar("Row")


def load_prompts(
    source: Any, field: str = "prompt", splits: Sequence[str] = ("train",), dialogue: bool = False
) -> list[str]:
    """Return prompts from any supported source, checked.

    Args:
        source: A list of strings; or any source of :func:`miepo.data.reading.read_rows`.
        field: Name of the column that holds the prompt.
        splits: Of a data set that has several, the first of these that it has.
        dialogue: Whether prompts of several messages are understood. A prompt may be a list of messages
            ``{"role": .., "content": ..}`` of user and assistant in turn.

    Raises:
        UserError: names the source, and for a file the line, that cannot be used.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError("the list of prompts: expected at least one prompt, got none")
        return [_prompt_text(prompt, f"prompt {i}", dialogue) for i, prompt in enumerate(source)]
    if not isinstance(source, str) and not hasattr(source, "column_names"):
        raise UserError(f"prompts must be a list, a .jsonl file or a data set, got {type(source).__name__}")
    rows = read_rows(source, {field: (str, list)}, splits)
    return [_prompt_text(row[field], f"{source}, prompt {i}", dialogue) for i, row in enumerate(rows, 1)]


def _prompt_text(prompt: Any, where: str, dialogue: bool) -> str:
    """Return a prompt as text: itself, or its messages as a dialogue of :mod:`miepo.text`."""
    if isinstance(prompt, str):
        check_text(prompt, where, "prompt")
        return prompt
    if not isinstance(prompt, list):
        raise UserError(f"{where}: expected text or a list of messages, got {type(prompt).__name__}")
    messages = []
    for i, message in enumerate(prompt):
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role != ("user", "assistant")[i % 2] or not isinstance(content, str):
            raise UserError(
                f"{where}: expected messages of user and assistant in turn, with text as content, got {message!r:.80}"
            )
        check_text(content, where, "message")
        messages.append((role, content))
    if len(messages) % 2 == 0:
        raise UserError(f"{where}: expected a last message of the user, got {len(messages)} messages")
    if len(messages) > 1 and not dialogue:
        raise UserError(f"{where}: expected policy.dialogue true for a prompt of {len(messages)} messages, got false")
    return dialogue_of(messages) if dialogue else messages[0][1]


def split_rows(
    rows: Sequence[Row], validation_fraction: float, seed: int, prompt: Callable[[Row], str] = str
) -> tuple[list[Row], list[Row]]:
    """Return a seeded split of prompts or examples into training and validation, so that no prompt stands in both.

    Args:
        rows: Prompts or examples.
        validation_fraction: Share of the distinct prompts that is held out; both parts keep at least one.
        seed: Of the split.
        prompt: The prompt of a row; by default the row is one.
    """
    distinct = list(dict.fromkeys(map(prompt, rows)))
    if len(distinct) < 2:
        raise UserError(f"a split into training and validation needs at least 2 prompts, got {len(distinct)}")
    count = min(max(round(validation_fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = {distinct[i] for i in generator(RandomStream.SPLIT, seed).permutation(len(distinct))[:count]}
    return [r for r in rows if prompt(r) not in held_out], [r for r in rows if prompt(r) in held_out]


def say_repeated(prompts: Sequence[str], held_out: Sequence[str]) -> None:
    """Tell of training prompts that occur more than once, and warn of those that are evaluated on, too."""
    distinct = set(prompts)
    if repeated := len(prompts) - len(distinct):
        rank_zero_info(f"{repeated} of {len(prompts)} training prompts repeat another one")
    if both := len(distinct.intersection(held_out)):
        rank_zero_warn(f"{both} prompts are in training and in validation: expected other prompts to evaluate on")
