"""HH-RLHF: the dialogues of the task helpful assistant."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from miepo.data.datasets.base import Comparison, PreferenceDataset
from miepo.errors import UserError, load_reason
from miepo.text import REPLY, STOPS, cut_at, split_turns


class HHRLHF(PreferenceDataset):
    """``Anthropic/hh-rlhf`` (about 160K dialogues; the paper: 8K prompts to train on, 2K to evaluate on).

    A prompt is everything up to and with the last ``\\n\\nAssistant:``, in which form the reward models read it, too.
    Rows are left out that are no dialogue in turns, whose prompt has too few or too many tokens, or whose two prompts
    differ. A response ends before a turn that was made up after it.

    Args:
        tokenizer: Hub id or folder of the tokenizer that counts: the policy's.
        min_tokens: Of a prompt.
        max_tokens: Of a prompt.
        source: Hub id, file or folder.
        train: See :class:`~miepo.data.datasets.base.PreferenceDataset`.
        test: See there.
        test_source: The hub's own test split by default, where ``source`` is the hub's.
        seed: See there.
    """

    dialogue = True

    def __init__(
        self, tokenizer: str, min_tokens: int = 8, max_tokens: int = 512, source: Any = "Anthropic/hh-rlhf",
        train: int = 8000, test: int = 2000, test_source: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if test_source is None and source == "Anthropic/hh-rlhf":
            test_source = source
        super().__init__(source, train, test, test_source, seed)
        self.fields = {"chosen": str, "rejected": str}
        if not 1 <= min_tokens <= max_tokens:
            raise UserError(f"HHRLHF: expected 1 <= min_tokens <= max_tokens, got {min_tokens} and {max_tokens}")
        self.tokenizer, self.min_tokens, self.max_tokens = tokenizer, min_tokens, max_tokens

    @cached_property
    def _count(self) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds, all of them about this source
            reason = load_reason(error)
            raise UserError(f"HHRLHF: expected a tokenizer at '{self.tokenizer}': {reason}") from None
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def read(self, row: Mapping[str, Any]) -> Comparison | str:
        chosen, rejected = (split_dialogue(row[key]) for key in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            return "no dialogue"
        if chosen[0] != rejected[0]:
            return "two prompts"
        if not self.min_tokens <= self._count(chosen[0]) <= self.max_tokens:
            return f"prompt not of {self.min_tokens} to {self.max_tokens} tokens"
        return Comparison(chosen[0], (chosen[1], rejected[1]), 0)


def split_dialogue(text: str) -> tuple[str, str] | None:
    """Return prompt, up to and with the last ``\\n\\nAssistant:``, and response; None where that is no dialogue."""
    head, mark, response = text.rpartition(REPLY)
    prompt = head + mark
    return (prompt, cut_at(response, STOPS).strip()) if mark and split_turns(prompt) else None
