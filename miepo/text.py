"""Texts: dialogues as HH-RLHF writes them, stop texts, and what no model can read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from miepo.errors import UserError

HUMAN, ASSISTANT = "Human", "Assistant"
REPLY = f"\n\n{ASSISTANT}:"
# a policy that goes on to play the human ends its response before it does
STOPS = ("\n\nHuman:", "\nHuman:", "\n\nAssistant:", "\nAssistant:")
_TURN = re.compile(rf"\n\n({HUMAN}|{ASSISTANT}):")


def split_turns(prompt: str) -> list[tuple[str, str]] | None:
    """Return roles and texts of a prompt, without the reply that is to be written.

    None where the prompt is no dialogue: text before the first turn, turns that do not alternate, or a last turn that
    is not the human's.
    """
    first, *rest = _TURN.split(prompt)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if turns and turns[-1][0] == ASSISTANT and not turns[-1][1].strip():
        turns = turns[:-1]
    expected_roles = [(HUMAN, ASSISTANT)[i % 2] for i in range(len(turns))]
    if first.strip() or len(turns) % 2 == 0 or [role for role, _ in turns] != expected_roles:
        return None
    return turns


def dialogue_of(messages: Sequence[tuple[str, str]]) -> str:
    """Return a prompt of turns from roles (``user``, ``assistant``) and texts; no text can begin a turn of its own."""
    names = {"user": HUMAN, "assistant": ASSISTANT}
    plain = re.compile(rf"\b({HUMAN}|{ASSISTANT}):", re.IGNORECASE)
    turns = [(names[role], plain.sub(r"\1 :", text)) for role, text in messages]
    return "".join(f"\n\n{name}: {text}" for name, text in turns)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return ``text`` up to the first of the ``stop`` texts in it."""
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


def check_text(value: str, where: str, what: str, blank_ok: bool = False) -> None:
    """Refuse text that no model can read."""
    if not value.strip() and not blank_ok:
        raise UserError(f"{where}: expected a {what}, got empty text")
    if not is_unicode(value):
        raise UserError(f"{where}: expected Unicode text, got half a character (a lone surrogate)")


def is_unicode(text: str) -> bool:
    """Return whether text is whole: without lone surrogates, which JSON can spell and no encoding knows."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
