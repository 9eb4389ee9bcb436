"""The in-memory queue between handlers and the writer, bounded in items and bytes.

The bounds cover every heartbeat that is admitted and not yet answered, queued or in a transaction.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from nexhb import log, metrics
from nexhb.errors import Overloaded
from nexhb.wire import FieldError, Heartbeat

_log = log.get("intake")


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


Settled = Callable[[list[Verdict]], None]  # takes a verdict for each heartbeat of a ticket; must not raise


class Ticket:
    """Heartbeats that somebody waits for together. Settled exactly once; later verdicts are ignored."""

    __slots__ = ("admitted_at", "heartbeats", "settled", "size")

    def __init__(self, heartbeats: Sequence[Heartbeat], size: int, admitted_at: float, settled: Settled) -> None:
        self.heartbeats = heartbeats
        self.size = size
        self.admitted_at = admitted_at  # s, time.monotonic(): the event loop's clock
        self.settled = settled  # called, not awaited: a future and the task behind it cost 4 µs a heartbeat


class Intake:
    """Admits heartbeats, hands all that wait to the writer, and keeps count of what is unanswered."""

    def __init__(self, *, max_items: int, max_bytes: int, random_fraction: Callable[[], float] = random.random) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.received = 0  # heartbeats that arrived, admitted or not
        self._received_counted = 0
        self.closed_because = ""  # the writer's: set while nothing can be committed; then nothing is admitted either
        self.closed_in_full = ""  # the same with the database's own words, for operators
        self.held_because = ""  # the daemon's: set while nothing should be
        self.failing_because = (
            ""  # the writer's: set while every try fails and nobody knows why; heartbeats go on trying
        )
        self._waiting: deque[Ticket] = deque()
        self._unanswered: dict[Ticket, None] = {}  # the oldest first
        self._items = 0
        self._bytes = 0
        self._arrived: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._random_fraction = random_fraction

    @property
    def items(self) -> int:
        """Heartbeats admitted and unanswered."""
        return self._items

    @property
    def bytes(self) -> int:
        """Bytes of their bodies."""
        return self._bytes

    @property
    def has_waiting(self) -> bool:
        """Whether the writer would find something to take."""
        return bool(self._waiting)

    @property
    def refuses(self) -> str:
        """Why no heartbeat can be committed now; empty while one can."""
        return self.closed_because or self.held_because or self.failing_because

    @property
    def filled(self) -> float:
        """How full it is, by items or by bytes: 0 to 1, or a little more."""
        return max(self._items / self.max_items, self._bytes / self.max_bytes)

    def check(self, items: int = 1) -> None:
        """Raise Overloaded where `items` more heartbeats would not be admitted: but where none waits, more of them than
        the bound are, as they could never be. Called before a body is read."""
        if self.closed_because or self.held_because:
            raise Overloaded(self.closed_because or self.held_because)
        if (self._items and self._items + items > self.max_items) or self._bytes >= self.max_bytes:
            raise Overloaded(f"{self._items} heartbeats ({self._bytes} bytes) wait to be committed.")

    @property
    def has_room(self) -> bool:
        """Whether one more heartbeat would be admitted."""
        return (
            self._items < self.max_items
            and self._bytes < self.max_bytes
            and not self.closed_because
            and not self.held_because
        )

    def retry_after_s(self) -> int:
        """When to come back: 2 to 12 s, spread so that a fleet does not return as one."""
        return 2 + int(10 * self._random_fraction())

    def admit(self, heartbeats: Sequence[Heartbeat], size: int, settled: Settled) -> Ticket:
        """Queue heartbeats of `size` bytes, all of them or none. Raises Overloaded over the bounds."""
        self.check(len(heartbeats))
        # Not the loop's time: to ask for the running loop is a system call (getpid), 1 µs a heartbeat.
        ticket = Ticket(heartbeats, size, time.monotonic(), settled)
        self._unanswered[ticket] = None
        self._items += len(heartbeats)
        self._bytes += size
        self._waiting.append(ticket)
        self._idle.clear()
        self.wake()
        return ticket

    def ask(self, heartbeats: Sequence[Heartbeat], size: int) -> asyncio.Future[list[Verdict]]:
        """The same for somebody who awaits the verdicts."""
        future: asyncio.Future[list[Verdict]] = asyncio.get_running_loop().create_future()

        def settled(verdicts: list[Verdict]) -> None:
            if not future.done():  # done: its handler was cancelled
                future.set_result(verdicts)

        self.admit(heartbeats, size, settled)
        return future

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
        """Every ticket that waits, of `most` heartbeats at the most (but one ticket at least); none that was settled
        meanwhile."""
        taken: list[Ticket] = []
        waiting = self._waiting
        while waiting:
            ticket = waiting[0]
            if ticket in self._unanswered:
                most -= len(ticket.heartbeats)
                if most < 0 and taken:
                    break
                taken.append(ticket)
            waiting.popleft()
        return taken

    async def idle(self) -> None:
        """Wait until everything admitted is answered."""
        await self._idle.wait()

    def settle(self, tickets: Sequence[Ticket], verdicts: Sequence[Verdict]) -> None:
        """Answer these tickets, a verdict for each of their heartbeats; of two verdicts on one, the first counts."""
        if len(verdicts) != sum(len(ticket.heartbeats) for ticket in tickets):
            raise ValueError("Verdicts and heartbeats do not match.")
        counted: list[Verdict] = []
        end = 0
        for ticket in tickets:
            start, end = end, end + len(ticket.heartbeats)
            if ticket not in self._unanswered:
                continue
            own = list(verdicts[start:end])
            del self._unanswered[ticket]
            self._items -= end - start
            self._bytes -= ticket.size
            counted += own
            try:
                ticket.settled(own)
            except Exception:  # one that cannot be told must not keep the verdict from the others
                _log.exception("intake.not_told")
        if not self._unanswered:
            self._idle.set()
        for verdict, count in _counts(counted):
            _COUNTERS[verdict.outcome].inc(count)

    def fail(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Answer these tickets: the device keeps what it sent."""
        self.settle(tickets, [Verdict(Outcome.FAILED, reason)] * sum(len(ticket.heartbeats) for ticket in tickets))

    def expire(self, now: float, after_s: float) -> None:
        """Fail what has waited for longer than `after_s` at `now` (the loop's clock): the device keeps it."""
        late = list(takewhile(lambda ticket: now - ticket.admitted_at > after_s, self._unanswered))
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
        metrics.intake_items.set(self._items)
        metrics.intake_bytes.set(self._bytes)
        metrics.intake_filled.set(self.filled)


def _counts(verdicts: list[Verdict]) -> Iterator[tuple[Verdict, int]]:
    """Verdicts and how many there are of them: nearly all are the two that are always the same object."""
    usual = 0
    for verdict in (WRITTEN, DEDUPLICATED):
        if count := verdicts.count(verdict):
            yield verdict, count
            usual += count
    if usual < len(verdicts):
        for verdict in verdicts:
            if verdict is not WRITTEN and verdict is not DEDUPLICATED:
                yield verdict, 1


_COUNTERS = {
    Outcome.WRITTEN: metrics.hb_writes,
    Outcome.DEDUPLICATED: metrics.hb_dedupe,
    Outcome.REFUSED: metrics.heartbeats_refused.labels(reason="database"),
    Outcome.FAILED: metrics.heartbeats_failed.labels(reason="uncommitted"),
}
