"""The in-memory queue between handlers and the writer, bounded in items and bytes.

The bounds cover every heartbeat that is admitted and not yet answered, queued or in a transaction.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nexhb import metrics
from nexhb.errors import Overloaded
from nexhb.wire import FieldError, Heartbeat


class Outcome(enum.Enum):
    """What became of a heartbeat: the ledger's four columns."""

    WRITTEN = "written"
    DEDUPLICATED = "deduplicated"
    REFUSED = "refused"
    FAILED = "failed"


class Verdict(NamedTuple):
    """The only thing that travels back from the writer to the handler."""

    outcome: Outcome
    reason: str = ""
    errors: tuple[FieldError, ...] = ()


WRITTEN = Verdict(Outcome.WRITTEN)
DEDUPLICATED = Verdict(Outcome.DEDUPLICATED)


class Ticket:
    """A heartbeat that somebody waits for. Settled exactly once; later verdicts are ignored."""

    __slots__ = ("admitted_at", "future", "heartbeat", "size")

    def __init__(self, heartbeat: Heartbeat, size: int, admitted_at: float, future: asyncio.Future[Verdict]) -> None:
        self.heartbeat = heartbeat
        self.size = size
        self.admitted_at = admitted_at  # s, the event loop's clock
        self.future = future


class Intake:
    """Admits heartbeats, hands all that wait to the writer, and keeps count of what is unanswered."""

    def __init__(self, *, max_items: int, max_bytes: int, random_fraction: Callable[[], float] = random.random) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.received = 0  # heartbeats that arrived, admitted or not
        self._received_counted = 0
        self.closed_because = ""  # the writer's: set while nothing can be committed; then nothing is admitted either
        self.held_because = ""  # the daemon's: set while nothing should be
        self.failing_because = (
            ""  # the writer's: set while every try fails and nobody knows why; heartbeats go on trying
        )
        self._waiting: deque[Ticket] = deque()
        self._unanswered: set[Ticket] = set()
        self._bytes = 0
        self._arrived: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._random_fraction = random_fraction

    @property
    def items(self) -> int:
        """Heartbeats admitted and unanswered."""
        return len(self._unanswered)

    @property
    def bytes(self) -> int:
        """Bytes of their bodies."""
        return self._bytes

    @property
    def filled(self) -> float:
        """How full it is, by items or by bytes: 0 to 1, or a little more."""
        return max(len(self._unanswered) / self.max_items, self._bytes / self.max_bytes)

    def check(self, items: int = 1) -> None:
        """Raise Overloaded where `items` more heartbeats would not be admitted. Called before a body is read."""
        if self.closed_because or self.held_because:
            raise Overloaded(self.closed_because or self.held_because)
        if len(self._unanswered) + items > self.max_items or self._bytes >= self.max_bytes:
            raise Overloaded(f"{len(self._unanswered)} heartbeats ({self._bytes} bytes) wait to be committed.")

    def retry_after_s(self) -> int:
        """When to come back: 2 to 12 s, spread so that a fleet does not return as one."""
        return 2 + int(10 * self._random_fraction())

    def admit(self, heartbeat: Heartbeat, size: int) -> Ticket:
        """Queue one heartbeat of `size` bytes. Raises Overloaded over the bounds."""
        self.check()
        loop = asyncio.get_running_loop()
        ticket = Ticket(heartbeat, size, loop.time(), loop.create_future())
        self._unanswered.add(ticket)
        self._idle.clear()
        self._bytes += size
        self._waiting.append(ticket)
        self.wake()
        return ticket

    async def wait(self, timeout_s: float) -> None:
        """Wait for a ticket, for `wake`, or for `timeout_s`. One waiter: the writer."""
        if self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._arrived = loop.create_future()
        # Not wait_for, which makes a task for each wait: under light load that is one a heartbeat.
        timer = loop.call_later(timeout_s, self.wake)
        try:
            await self._arrived
        finally:
            timer.cancel()
            self._arrived = None

    def wake(self) -> None:
        """End a `wait`."""
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def take(self, most: int) -> list[Ticket]:
        """Every ticket that waits, `most` at the most; none that was settled meanwhile."""
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        return [ticket for ticket in taken if ticket in self._unanswered]

    async def idle(self) -> None:
        """Wait until everything admitted is answered."""
        await self._idle.wait()

    def settle(self, tickets: Sequence[Ticket], verdicts: Iterable[Verdict]) -> None:
        """Answer these tickets; of two verdicts on one, the first counts."""
        outcomes: dict[Outcome, int] = {}
        for ticket, verdict in zip(tickets, verdicts, strict=True):
            if ticket not in self._unanswered:
                continue
            self._unanswered.discard(ticket)
            self._bytes -= ticket.size
            if not ticket.future.done():  # done: its handler was cancelled
                ticket.future.set_result(verdict)
            outcomes[verdict.outcome] = outcomes.get(verdict.outcome, 0) + 1
        if not self._unanswered:
            self._idle.set()
        for outcome, count in outcomes.items():
            _COUNTERS[outcome].inc(count)

    def fail(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Answer these tickets: the device keeps what it sent."""
        self.settle(tickets, [Verdict(Outcome.FAILED, reason)] * len(tickets))

    def expire(self, now: float, after_s: float) -> None:
        """Fail what has waited for longer than `after_s` at `now` (the loop's clock): the device keeps it."""
        late = [t for t in self._unanswered if now - t.admitted_at > after_s]
        if late:
            self.fail(late, "not committed in time")
            # While the database is away nobody takes them: the queue must not grow by what is answered already.
            self._waiting = deque(t for t in self._waiting if t in self._unanswered)

    def fail_all(self, reason: str) -> None:
        """Fail everything unanswered."""
        self._waiting.clear()
        self.fail(list(self._unanswered), reason)

    def observe(self) -> None:
        """Bring the metrics up to date; done now and then, because a counter's lock costs 1 µs a heartbeat."""
        metrics.heartbeats_ingested.inc(self.received - self._received_counted)
        self._received_counted = self.received
        metrics.intake_items.set(len(self._unanswered))
        metrics.intake_bytes.set(self._bytes)
        metrics.intake_filled.set(self.filled)


_COUNTERS = {
    Outcome.WRITTEN: metrics.hb_writes,
    Outcome.DEDUPLICATED: metrics.hb_dedupe,
    Outcome.REFUSED: metrics.heartbeats_refused.labels(reason="database"),
    Outcome.FAILED: metrics.heartbeats_failed.labels(reason="uncommitted"),
}
