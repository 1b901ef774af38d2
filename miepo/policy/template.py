"""From (prompt, preference text) to token ids, so that nothing in a user's prompt becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from miepo.errors import UserError

# Section "Prompt construction" of the paper; the preference text brings its own leading space.
PAPER_TEMPLATE = "Human: {prompt}{preference} Assistant:"
_CONTENT = "{prompt}{preference}"
_SENTINEL = "miepo-content-goes-here"


class PromptTemplate:
    """Wraps the content, which is the user's text and the preference text, in the template's own text.

    Control tokens are recognised in the template only. The content is tokenised as plain text. What a tokenizer or a
    template marks without a special token (``Human:`` of a plain template, ``<|assistant|>``, ``[/INST]``, added
    tokens such as ``<think>``) is defused in the user's part by a space before its last character.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: ``auto`` (the tokenizer's chat template, or the paper's where there is none), ``chat``, ``paper``, or
            a text that contains ``{prompt}{preference}``.
        markers: Further strings to defuse in the user's text.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", markers: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "paper"
        if template == "chat":
            if not tokenizer.chat_template:
                raise UserError("template 'chat' needs a tokenizer with a chat template; this one has none")
            message = [{"role": "user", "content": _SENTINEL}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            if text.count(_SENTINEL) != 1:
                raise UserError("expected a chat template that shows the user's message once, this one does not")
            self.prefix, self.suffix = text.split(_SENTINEL)
        else:
            text = PAPER_TEMPLATE if template == "paper" else template
            if text.count(_CONTENT) != 1:
                raise UserError(
                    f"template must be 'auto', 'chat', 'paper' or a text with {_CONTENT} once, got {template!r}"
                )
            self.prefix, self.suffix = text.split(_CONTENT)
        frame = self._control_ids(self.prefix) + self._control_ids(self.suffix)
        special = set(tokenizer.all_special_ids)
        added_ids = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        self._control = {*added_ids, *special} - {tokenizer.unk_token_id}
        self.has_control_tokens = any(i in self._control for i in frame)
        pattern = r"<[^<>\s]+>|\[[^\[\]\s]+\]" + ("" if self.has_control_tokens else r"|\w+:")
        roles = [m for m in re.findall(pattern, self.prefix + self.suffix) if m not in tokenizer.all_special_tokens]
        added = [text for i, text in added_ids.items() if i not in special]
        literal = sorted({*roles, *added, *markers}, key=len, reverse=True)
        self._defuse = re.compile("|".join(map(re.escape, literal)), re.IGNORECASE) if literal else None
        self._start = self._start_ids(frame)
        # an evaluation asks for every input once for each vector of the grid; bounded, for long prompts
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def text(self, prompt: str, preference: str = "") -> str:
        """The whole input as text."""
        return f"{self.prefix}{self._user_text(prompt)}{preference}{self.suffix}"

    def _encode(self, prompt: str, preference: str = "") -> list[int]:
        """The whole input as token ids."""
        content = self._user_text(prompt) + preference
        if not self.has_control_tokens:  # one piece, so that words at the seams are tokenised as in running text
            return self._start + self._plain_ids(self.prefix + content + self.suffix)
        return self._start + self._control_ids(self.prefix) + self._plain_ids(content) + self._control_ids(self.suffix)

    def _user_text(self, prompt: str) -> str:
        if self._defuse is None:
            return prompt
        return self._defuse.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", prompt)

    def _control_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _plain_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
        # never trust the flag alone: a tokenizer that ignores it would hand the user its control tokens
        if found := self._control.intersection(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(found))
            raise UserError(f"expected plain text, but this tokenizer reads {names} in {text[:80]!r} as control tokens")
        return ids

    def _start_ids(self, frame: Sequence[int]) -> list[int]:
        """The begin-of-text token where the tokenizer adds one by itself and the template does not."""
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if bos is not None and added and list(frame[:1]) != [bos] else []
