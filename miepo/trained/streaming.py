"""Responses as they are written: many at a time, each under its own preference, with settings of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from miepo.errors import UserError
from miepo.policy import Policy
from miepo.rollout.fused_decoder import FusedDecoder, Layout, fits
from miepo.rollout.transformers_engine import draw_tokens
from miepo.text import cut_at
from miepo.trained.plain_decoder import PlainDecoder

NETWORK = threading.Lock()  # one thread at a time: the gate is the policy's
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationRequest:
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
class Chunk:
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
        self._stream: Any = DecodeStream(skip_special_tokens=True)
        self._text = self._shown = ""

    def add(self, token: int) -> str:
        """Return what has become certain with this token."""
        self.ids.append(token)
        try:
            if self._stream is not None:
                self._text += self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception:  # of tokens by bytes, where a character stays incomplete: from now on all of them each time
            self._stream = None
        if self._stream is None:
            self._text = self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip("\ufffd")
        cut = cut_at(self._text, self.stop)
        self.stopped = cut != self._text
        return self._show(cut if self.stopped else self._certain())

    def end(self) -> str:
        """Return what was held back."""
        return self._show(cut_at(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop))

    def _certain(self) -> str:
        """Return all but what may be the beginning of a stop text."""
        limit = len(self._text) + 1
        held = [n for text in self.stop for n in range(1, min(len(text), limit)) if self._text.endswith(text[:n])]
        return self._text[: len(self._text) - max(held, default=0)]

    def _show(self, text: str) -> str:
        text = text.strip()
        new = text[len(self._shown) :]
        self._shown += new
        return new


def check_length(policy: Policy, question: GenerationRequest) -> None:
    """Refuse a question that does not fit the model's context together with its response."""
    limit, prompt_length, tokens = policy.context_length, len(question.ids), question.max_new_tokens
    if limit is not None and prompt_length + tokens > limit:
        raise UserError(
            f"the prompt has {prompt_length} tokens, the response may have {tokens}: expected at most {limit} together"
        )


@dataclass
class _Row:
    """A response that is being written."""

    number: int
    question: GenerationRequest
    text: ResponseText
    draws: Tensor  # (T,) float64 in [0, 1): a function of its seed alone


class ContinuousDecoder:
    """Writes responses, all by one token at a time; questions join at any token and leave when they are answered.

    Rows are numbered in the order in which their questions came.

    Args:
        policy: In evaluation mode. Its weights stay as they are.
        max_rows: About as many responses are written together.

    Raises:
        UserError: the network keeps a state beside its cache, of which rows can neither be padded nor leave.
    """

    def __init__(self, policy: Policy, max_rows: int) -> None:
        if getattr(policy.causal_lm, "_is_stateful", False) and not fits(policy):
            kind = type(policy.causal_lm).__name__
            raise UserError(f"{kind} keeps a state that padding changes: expected a network of attention alone")
        self.policy, self.max_rows = policy, max_rows
        self._ends = set(policy.end_ids)
        self._layout: Layout | None = None
        self._rows: list[_Row] = []
        self._count = 0
        self._decoder: Any = None
        self._logits: Tensor | None = None  # (N, V) of those that have none of their tokens yet
        self._chosen: Tensor | None = None  # (n,) the last tokens of the others, which come before them

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def joins(self) -> bool:
        """Whether a question may come now: some networks keep what cannot be joined, and end what they are at first."""
        return self._decoder is None or isinstance(self._decoder, FusedDecoder) or self._decoder.joins

    def join(self, questions: Sequence[GenerationRequest]) -> list[int]:
        """Compute these questions; their responses are written from the next :meth:`step` on.

        Returns:
            The numbers of their rows.

        Raises:
            UserError: a question does not fit the model's context.

        What fails while the questions are computed leaves the others as they are; what fails later ends all.
        """
        for question in questions:
            check_length(self.policy, question)
        with NETWORK, torch.no_grad():
            fresh = self._decode(questions)
            logits = fresh.start()
            try:
                self._take(fresh, logits)
            except Exception:  # out of memory, say, with half of the caches joined
                self.clear()
                raise
        added = []
        for i, q in enumerate(questions):
            draws = torch.rand(q.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(q.seed))
            added.append(_Row(self._count + i, q, ResponseText(self.policy.tokenizer, q.stop), draws))
        self._rows += added
        self._count += len(added)
        return [row.number for row in added]

    def _decode(self, questions: Sequence[GenerationRequest]) -> FusedDecoder | PlainDecoder:
        prompts = self.policy.padded([question.ids for question in questions])
        preference = torch.stack([question.preference for question in questions]).to(self.policy.device)
        if not fits(self.policy):
            return PlainDecoder(self.policy, prompts, preference)
        if self._layout is None:
            self._layout = Layout(self.policy, self.max_rows)
        longest = max(question.max_new_tokens for question in questions)
        return FusedDecoder(self.policy, prompts, preference, 1, longest, layout=self._layout)

    def _take(self, fresh: FusedDecoder | PlainDecoder, logits: Tensor) -> None:
        if self._decoder is None:
            self._decoder, self._logits = fresh, logits
            return
        if self._chosen is not None:  # those that are written already get as far as the new ones
            self._logits, self._chosen = self._decoder.next(self._chosen), None
        assert self._logits is not None
        self._decoder.join(fresh)
        self._logits = torch.cat([self._logits, logits])

    def step(self, cancelled: Callable[[int], bool] = lambda row: False) -> list[Chunk]:
        """Return the next token of every response.

        Args:
            cancelled: Whether nobody waits for the response of this row any more.
        """
        with NETWORK, torch.no_grad():
            logits = self._logits if self._chosen is None else self._decoder.next(self._chosen)
            assert logits is not None
            asked = [row.question for row in self._rows]
            temperature = torch.tensor([q.temperature for q in asked], device=logits.device)
            top_p = torch.tensor([q.top_p for q in asked], device=logits.device)
            uniform = torch.stack([row.draws[len(row.text.ids)] for row in self._rows]).to(logits.device)
            chosen = choose(logits, temperature, top_p, uniform)  # (N,)
        pieces, remaining = [], []
        for i, (row, token) in enumerate(zip(self._rows, chosen.tolist(), strict=True)):
            text = row.text.add(token)
            finish: Finish | None = None
            if token in self._ends or row.text.stopped:
                finish = "stop"
            elif len(row.text.ids) == row.question.max_new_tokens:
                finish = "length"
            elif cancelled(row.number):
                finish = "cancelled"
            if finish is None:
                remaining.append(i)
            else:
                text += row.text.end()
            if text or finish:
                pieces.append(Chunk(row.number, text, len(row.text.ids), finish))
        if not remaining:
            self.clear()
        elif len(remaining) < len(self._rows):
            remaining_rows = torch.tensor(remaining, device=chosen.device)
            with NETWORK, torch.no_grad():
                self._decoder.keep(remaining_rows)
            self._rows, chosen = [self._rows[i] for i in remaining], chosen[remaining_rows]
        if remaining:
            self._logits, self._chosen = None, chosen
        return pieces

    def clear(self) -> None:
        """End all responses where they are."""
        self._rows, self._decoder, self._logits, self._chosen = [], None, None, None


def stream(
    policy: Policy, questions: Sequence[GenerationRequest], cancelled: Callable[[int], bool] = lambda row: False
) -> Iterator[Chunk]:
    """Answer requests together, and yield what each response has got with every token.

    Args:
        policy: In evaluation mode.
        questions: ``N``.
        cancelled: Whether nobody waits for the response to this question any more; asked at every token.

    Raises:
        UserError: a question does not fit the model's context.
    """
    responder = ContinuousDecoder(policy, len(questions))
    responder.join(questions)
    while len(responder):
        yield from responder.step(cancelled)


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Return the next token of every row.

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
