"""Requests of many clients, answered together by one thread that owns the network."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from miepo.policy import Policy
from miepo.rollout.streaming import Piece, Question, stream

logger = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait as may."""


class Ticket:
    """One request: its pieces go to ``deliver``, which must return at once, from the batcher's thread."""

    def __init__(self, question: Question, deadline: float, deliver: Callable[[Piece | Exception], None]) -> None:
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
    """Answers what waits, up to ``most`` requests at once, then what has come meanwhile.

    Args:
        policy: In evaluation mode; nobody else runs it.
        most: Requests that are answered together.
        waiting: Requests that may wait; more are refused.
    """

    def __init__(self, policy: Policy, most: int = 16, waiting: int = 64) -> None:
        self.policy, self.most, self.limit = policy, most, waiting
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._tickets)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Takes all of them or none.

        Raises:
            Busy: too many wait already.
        """
        with self._changed:
            self._tickets = deque(ticket for ticket in self._tickets if not ticket.cancelled)
            if len(self._tickets) + len(tickets) > self.limit:
                raise Busy
            self._tickets.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the batch that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets or self._closed)
                if self._closed:
                    return
                batch = [self._tickets.popleft() for _ in range(min(self.most, len(self._tickets)))]
            self._answer(batch)

    def _answer(self, batch: list[Ticket]) -> None:
        for ticket in batch:
            if ticket.late:
                self._end(ticket, TimeoutError("it waited too long for its turn"))
        batch = [ticket for ticket in batch if not (ticket.done or ticket.cancelled)]
        if not batch:
            return
        try:
            for piece in stream(self.policy, [t.question for t in batch], lambda row: batch[row].gone):
                ticket = batch[piece.row]
                if piece.finish == "cancelled":
                    self._end(ticket, TimeoutError("the response took too long"))
                elif piece.finish is None:
                    ticket.deliver(piece)
                else:
                    self._end(ticket, piece)
        except Exception as error:  # of one batch: those that come after it are answered
            logger.exception("a batch of %d requests failed", len(batch))
            for ticket in batch:
                self._end(ticket, error)

    def _end(self, ticket: Ticket, last: Piece | Exception) -> None:
        if not ticket.done:
            ticket.done = True
            ticket.deliver(last)
