"""Requests of many clients, answered together by one thread that owns the network."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from miepo.policy import Policy
from miepo.trained.streaming import Chunk, ContinuousDecoder, GenerationRequest

MOST_TOKENS = 2048  # of prompts that are computed at the same time, padding included: all others wait meanwhile
logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The server ends."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


class PendingRequest:
    """One request: its pieces go to ``deliver``, which must return at once, from the batcher's thread."""

    def __init__(
        self, question: GenerationRequest, deadline: float, deliver: Callable[[Chunk | Exception], None]
    ) -> None:
        self.question, self.deadline, self.deliver = question, deadline, deliver
        self.cancelled = self.done = False

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the rest."""
        return self.cancelled or self.late


class Batcher:
    """Answers up to ``max_rows`` requests at once, all by one token at a time.

    Who waits joins as soon as there is room.

    Args:
        policy: In evaluation mode; nobody else runs it.
        max_rows: Requests that are answered together.
        max_queue: Requests that may wait; more are refused.
    """

    def __init__(self, policy: Policy, max_rows: int = 16, max_queue: int = 64) -> None:
        self.max_rows, self.limit = max_rows, max_queue
        self._responder = ContinuousDecoder(policy, max_rows)
        self._tickets: deque[PendingRequest] = deque()
        self._coming: list[PendingRequest] = []  # whose prompts are being computed
        self._answered: dict[int, PendingRequest] = {}  # by row
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._tickets)

    def submit(self, tickets: Sequence[PendingRequest]) -> None:
        """Take all of them or none; after :meth:`stop` they end at once.

        Raises:
            QueueFull: too many wait already.
        """
        with self._changed:
            if self._closed:
                for ticket in tickets:
                    self._end(ticket, Stopped())
                return
            self._tickets = deque(ticket for ticket in self._tickets if not ticket.cancelled)
            if len(self._tickets) + len(tickets) > self.limit:
                raise QueueFull
            self._tickets.extend(tickets)
            self._changed.notify()

    def stop(self) -> None:
        """End all requests at once, and the thread after the token that it is at; signal handlers may call it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            for ticket in [*self._answered.values(), *self._coming, *self._tickets]:
                self._end(ticket, Stopped())

    def close(self) -> None:
        """Stop, and wait for the thread, though not for long: nobody can stop the network at a long prompt."""
        self.stop()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets or self._answered or self._closed)
                if self._closed:
                    break
                self._coming = self._next()
            self._join(self._coming)
            self._coming = []
            self._step()
        self.stop()  # what came to be answered meanwhile

    def _next(self) -> list[PendingRequest]:
        """Return who is answered from now on."""
        come: list[PendingRequest] = []
        longest = 0
        while self._tickets and self._responder.joins and len(self._answered) + len(come) < self.max_rows:
            longest = max(longest, len(self._tickets[0].question.ids))
            if come and longest * (len(come) + 1) > MOST_TOKENS:
                break
            ticket = self._tickets.popleft()
            if ticket.late:
                self._end(ticket, TimeoutError("it waited too long for its turn"))
            elif not ticket.cancelled:
                come.append(ticket)
        return come

    def _join(self, come: list[PendingRequest]) -> None:
        if not come:
            return
        try:
            rows = self._responder.join([ticket.question for ticket in come])
            self._answered.update(zip(rows, come, strict=True))
        except Exception as error:
            self._fail(error, come)

    def _step(self) -> None:
        if not self._answered:
            return
        try:
            pieces = self._responder.step(lambda row: self._answered[row].gone)
        except Exception as error:
            self._responder.clear()
            self._fail(error, [])
            return
        for piece in pieces:
            if piece.finish is None:
                self._answered[piece.row].deliver(piece)
                continue
            late = TimeoutError("the response took too long") if piece.finish == "cancelled" else None
            self._end(self._answered.pop(piece.row), late or piece)

    def _fail(self, error: Exception, tickets: list[PendingRequest]) -> None:
        """End these requests, and those that the error took with it; who comes after them is answered."""
        if not len(self._responder):
            tickets = [*tickets, *self._answered.values()]
            self._answered.clear()
        logger.error("%d requests failed", len(tickets), exc_info=error)
        for ticket in tickets:
            self._end(ticket, error)

    def _end(self, ticket: PendingRequest, last: Chunk | Exception) -> None:
        if not ticket.done:
            ticket.done = True
            ticket.deliver(last)
