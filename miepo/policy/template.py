"""From (prompt, preference text) to token ids, so that nothing in a user's prompt becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from miepo.errors import UserError, first_line
from miepo.text import ASSISTANT, HUMAN, is_unicode, split_turns

# Section "Prompt construction" of the paper; the preference text brings its own leading space.
PAPER_TEMPLATE = "Human: {prompt}{preference} Assistant: {response}"
HH = "hh"  # dialogues as HH-RLHF writes them; the prompt brings its turns
HH_TEMPLATE = "{prompt}{preference}\n\nAssistant: {response}"
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}
_RESPONSE = "{response}"
_CONTENT = "{prompt}{preference}"
_SENTINEL = "miepo-content-goes-here"


class PromptTemplate:
    """Wraps the content, which is the user's text and the preference text, in the template's own text.

    Control tokens are recognised in the template only. The content is tokenised as plain text. What a tokenizer or a
    template marks without a special token (``Human:`` of a plain template, ``<|assistant|>``, ``[/INST]``, added
    tokens such as ``<think>``) is defused in the user's part by a space before its last character.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: ``auto`` (the tokenizer's chat template, or the paper's where there is none), ``chat``, ``paper``,
            ``hh``, or a text that contains ``{prompt}{preference}`` and may end with ``{response}``, which shows
            whether a response begins with a space.
        markers: Further strings to defuse in the user's text.
        dialogue: Prompts are dialogues of turns ``\\n\\nHuman:`` and ``\\n\\nAssistant:``, as HH-RLHF writes them.
            A chat template gets them as messages; other templates keep them as they are. ``hh`` implies it.
    """

    def __init__(
        self, tokenizer: Any, template: str = "auto", markers: Sequence[str] = (), dialogue: bool = False
    ) -> None:
        self.tokenizer, self.dialogue = tokenizer, dialogue or template == HH
        self._frame = cache(self._make_frame)  # of this template, and gone with it
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "paper"
        if template == "chat":
            if not tokenizer.chat_template:
                raise UserError("template 'chat' needs a tokenizer with a chat template; this one has none")
            self.chat, self.lead = True, ""
            self.prefix, self.suffix = self._frame(("user",))
        else:
            self.chat = False
            if "\\n" in template:
                rank_zero_warn(
                    "the template has the two characters \\n and no line break there: YAML reads one in double quotes "
                    "alone, a shell in $'..'"
                )
            text = {"paper": PAPER_TEMPLATE, HH: HH_TEMPLATE}.get(template, template)
            before, response, after = text.partition(_RESPONSE)
            if text.count(_CONTENT) != 1 or after:
                raise UserError(
                    f"template must be 'auto', 'chat', 'paper', 'hh' or a text with {_CONTENT} once, "
                    f"{_RESPONSE} at its end or not at all, got {template!r}"
                )
            self.prefix, self.suffix = before.split(_CONTENT)
            # the policy writes the white space in front of a response itself
            self.lead = self.suffix[len(self.suffix.rstrip()) :] if response else ""
            self.suffix = self.suffix.removesuffix(self.lead)
        frame = self._control_ids(self.prefix) + self._control_ids(self.suffix)
        special = set(tokenizer.all_special_ids)
        added_ids = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        self._control = {*added_ids, *special} - {tokenizer.unk_token_id}
        self.has_control_tokens = any(i in self._control for i in frame)
        pattern = r"<[^<>\s]+>|\[[^\[\]\s]+\]" + ("" if self.has_control_tokens else r"|\w+:")
        roles = [m for m in re.findall(pattern, self.prefix + self.suffix) if m not in tokenizer.all_special_tokens]
        added = [text for i, text in added_ids.items() if i not in special]
        turns = [f"{role}:" for role in _ROLES] if self.dialogue else []
        literal = sorted({*roles, *added, *markers, *turns}, key=len, reverse=True)
        self._defuse = re.compile("|".join(map(re.escape, literal)), re.IGNORECASE) if literal else None
        self.start = self._start_ids(frame)
        # an evaluation asks for every input once for each vector of the grid; bounded, for long prompts
        self.encode = lru_cache(maxsize=4096)(self.encode_once)

    def text(self, prompt: str, preference: str = "") -> str:
        """Return the whole input as text."""
        frames, contents = self._parts(prompt, preference)
        return frames[0] + "".join(content + frame for content, frame in zip(contents, frames[1:], strict=True))

    def encode_once(self, prompt: str, preference: str = "") -> list[int]:
        """Return the whole input as token ids; ``encode`` keeps them."""
        if not self.has_control_tokens:  # one piece, so that words at the seams are tokenised as in running text
            return self.start + self._plain_ids(self.text(prompt, preference))
        frames, contents = self._parts(prompt, preference)
        ids = self.start + self._control_ids(frames[0])
        for content, frame in zip(contents, frames[1:], strict=True):
            ids += self._plain_ids(content) + self._control_ids(frame)
        return ids

    def encode_response(self, prompt: str, preference: str, response: str) -> list[int]:
        """Return a given response as token ids, as the policy would have sampled it after this input.

        Without an end token.
        """
        if self.has_control_tokens:
            return self._plain_ids(self.lead + response)
        prompt_ids = self.encode(prompt, preference)
        whole = self.start + self._plain_ids(self.text(prompt, preference) + self.lead + response)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self._plain_ids(self.lead + response)  # a token spans the seam, which sampling cannot make

    def _parts(self, prompt: str, preference: str) -> tuple[Sequence[str], list[str]]:
        """Return the template's own text around each piece of the user's, and these pieces.

        The last states the preference.
        """
        if not self.dialogue:
            return (self.prefix, self.suffix), [self._user_text(prompt) + preference]
        turns = split_turns(prompt)
        if turns is None:
            raise UserError(
                "expected a dialogue of turns '\\n\\nHuman:' and '\\n\\nAssistant:' in turn that ends with the human's "
                f"one, got {prompt[-80:]!r}"
            )
        if self.chat:
            contents = [self._user_text(text.strip()) for _, text in turns]
            contents[-1] += preference
            return self._frame(tuple(_ROLES[role] for role, _ in turns)), contents
        text = "".join(f"\n\n{role}:{self._user_text(text)}" for role, text in turns)
        return (self.prefix, self.suffix), [text + preference]

    def _make_frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """Return what the chat template writes around messages of these roles."""
        messages = [{"role": role, "content": f"{_SENTINEL}-{i}-"} for i, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # of models that think aloud: a response is the answer
            )
        except Exception as error:  # whatever a template's own code raises
            raise UserError(
                f"expected a chat template that writes {' and '.join(dict.fromkeys(roles))} messages, got one that "
                f"does not: {first_line(error)}"
            ) from None
        frames = re.split(f"{_SENTINEL}-(\\d+)-", text)
        if frames[1::2] != [str(i) for i in range(len(roles))]:
            raise UserError("expected a chat template that shows every message once, in order; this one does not")
        return tuple(frames[::2])

    def _user_text(self, prompt: str) -> str:
        if self._defuse is None:
            return prompt
        text = self._defuse.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", prompt)
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        # it may turn other characters into those of a marker
        seen = "" if normalizer is None or not is_unicode(text) else normalizer.normalize_str(text)
        if found := self._defuse.search(seen):
            raise UserError(f"expected plain text, got {prompt[:80]!r}, in which this tokenizer reads '{found[0]}'")
        return text

    def _control_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _plain_ids(self, text: str) -> list[int]:
        if not is_unicode(text):
            raise UserError(f"expected Unicode text, got half a character (a lone surrogate) in {text[:80]!r}")
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
        # never trust the flag alone: a tokenizer that ignores it would hand the user its control tokens
        if found := self._control.intersection(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(found))
            raise UserError(f"expected plain text, but this tokenizer reads {names} in {text[:80]!r} as control tokens")
        return ids

    def _start_ids(self, frame: Sequence[int]) -> list[int]:
        """Return the begin-of-text token where the tokenizer adds one by itself and the template does not."""
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if bos is not None and added and list(frame[:1]) != [bos] else []
