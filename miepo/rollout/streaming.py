"""Responses as they are written: many at a time, each under its own preference, with settings of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn import functional as F

from miepo.dialogue import cut_at
from miepo.errors import UserError
from miepo.policy import Policy
from miepo.rollout.fused_decoder import FusedDecoder, fits
from miepo.rollout.plain_decoder import PlainDecoder
from miepo.rollout.transformers_engine import draw_tokens

NETWORK = threading.Lock()  # one thread at a time: the gate is the policy's
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Question:
    """What one response answers, and how it is drawn.

    Attributes:
        ids: The input as token ids, from :meth:`Policy.template`.
        preference: ``(K,)``.
        max_new_tokens: The response is cut after this many tokens.
        temperature: 0 takes the most probable token each time.
        top_p: Draws from the fewest tokens that have this much of the probability.
        stop: Texts that end the response, and are not part of it.
        seed: Fixes the draw, whatever else is answered at the same time.
    """

    ids: Sequence[int]
    preference: Tensor
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Piece:
    """The next piece of the response to the ``row``-th question; the last says why it ends."""

    row: int
    text: str
    tokens: int  # of the response so far
    finish: Finish | None = None


class ResponseText:
    """Text of a response from its tokens, as far as it can no longer change: nothing of a stop text is ever shown.

    White space at both ends is left out, as engines do.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text = self._shown = ""

    def add(self, token: int) -> str:
        """What has become certain with this token."""
        self.ids.append(token)
        try:
            self._text += self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception:  # of tokens by bytes, where a character stays incomplete
            self._text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self._stream = DecodeStream(skip_special_tokens=True)
        cut = cut_at(self._text, self.stop)
        self.stopped = cut != self._text
        return self._show(cut if self.stopped else self._certain())

    def end(self) -> str:
        """What was held back."""
        return self._show(cut_at(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop))

    def _certain(self) -> str:
        """All but what may be the beginning of a stop text."""
        most = len(self._text) + 1
        held = [n for text in self.stop for n in range(1, min(len(text), most)) if self._text.endswith(text[:n])]
        return self._text[: len(self._text) - max(held, default=0)]

    def _show(self, text: str) -> str:
        text = text.strip()
        new = text[len(self._shown) :]
        self._shown += new
        return new


def check_length(policy: Policy, question: Question) -> None:
    """Refuses a question that does not fit the model's context together with its response."""
    limit, given, tokens = policy.context_length, len(question.ids), question.max_new_tokens
    if limit is not None and given + tokens > limit:
        raise UserError(
            f"the prompt has {given} tokens, the response may have {tokens}: expected at most {limit} together"
        )


@torch.no_grad()
def _decoder(policy: Policy, questions: Sequence[Question], longest: int) -> FusedDecoder | PlainDecoder:
    prompts = policy.padded([question.ids for question in questions])
    preference = torch.stack([question.preference for question in questions]).to(policy.device)
    if fits(policy):
        return FusedDecoder(policy, prompts, preference, 1, longest)
    return PlainDecoder(policy, prompts, preference)


def stream(
    policy: Policy, questions: Sequence[Question], cancelled: Callable[[int], bool] = lambda row: False
) -> Iterator[Piece]:
    """Answers questions together, and yields what each response has got with every token.

    Args:
        policy: In evaluation mode.
        questions: ``N``.
        cancelled: Whether nobody waits for the response to this question any more; asked at every token.

    Raises:
        UserError: a question does not fit the model's context.
    """
    for question in questions:
        check_length(policy, question)
    ends, device = set(policy.end_ids), policy.device
    texts = [ResponseText(policy.tokenizer, question.stop) for question in questions]
    longest = max(question.max_new_tokens for question in questions)  # T
    draws = torch.stack(
        [
            F.pad(
                torch.rand(q.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(q.seed)),
                (0, longest - q.max_new_tokens),
            )
            for q in questions
        ]
    ).to(device)  # (N, T), each row a function of its seed alone
    temperature = torch.tensor([q.temperature for q in questions], device=device)
    top_p = torch.tensor([q.top_p for q in questions], device=device)
    rows = list(range(len(questions)))
    with NETWORK:
        decoder = _decoder(policy, questions, longest)
    chosen: Tensor | None = None
    for t in range(longest):
        with NETWORK, torch.no_grad():  # not around a yield: who reads may want gradients, or read two
            logits = decoder.start() if chosen is None else decoder.next(chosen)
            chosen = choose(logits, temperature[rows], top_p[rows], draws[rows, t])  # (n,)
        left = []
        for i, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            text, ended = texts[row], token in ends
            piece = text.add(token)
            finish: Finish | None = None
            if ended or text.stopped:
                finish = "stop"
            elif t + 1 == questions[row].max_new_tokens:
                finish = "length"
            elif cancelled(row):
                finish = "cancelled"
            if finish is None:
                left.append(i)
            else:
                piece += text.end()
            if piece or finish:
                yield Piece(row, piece, len(text.ids), finish)
        if not left:
            return
        if len(left) < len(rows):
            kept = torch.tensor(left, device=device)
            with torch.no_grad():
                decoder.keep(kept)
            rows, chosen = [rows[i] for i in left], chosen[kept]


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The next token of every row.

    Args:
        logits: ``(N, V)`` float32.
        temperature: ``(N,)``; 0 takes the most probable token.
        top_p: ``(N,)`` the fewest tokens with this much of the probability are drawn from.
        uniform: ``(N,)`` float64 in [0, 1), by which it is drawn.
    """
    greedy = logits.argmax(-1)
    scaled = logits / temperature.clamp(min=1e-6).unsqueeze(1)
    if bool((top_p < 1).any()):
        ordered, index = scaled.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p.unsqueeze(1)  # what comes before is enough without it
        beyond[:, 0] = False  # however small top_p is
        beyond = torch.zeros_like(beyond).scatter(1, index, beyond & (top_p < 1).unsqueeze(1))
        scaled = scaled.masked_fill(beyond, -torch.inf)
    return torch.where(temperature == 0, greedy, draw_tokens(scaled, uniform))
