"""The in-memory queue between the request handlers and the writer, limited in items and bytes.

The limits cover every heartbeat that is admitted and not yet answered, whether it is queued or in a transaction.
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
from nexhb.heartbeat import FieldError, Heartbeat
from nexhb.readiness import Readiness

_log = log.get("intake")


class Outcome(enum.Enum):
    """The outcome of a heartbeat."""

    WRITTEN = "written"
    DEDUPLICATED = "deduplicated"
    REFUSED = "refused"
    FAILED = "failed"


class Verdict(NamedTuple):
    """The writer's result for one heartbeat; nothing else travels back to the handler."""

    outcome: Outcome
    reason: str = ""
    errors: tuple[FieldError, ...] = ()


WRITTEN = Verdict(Outcome.WRITTEN)
DEDUPLICATED = Verdict(Outcome.DEDUPLICATED)


OnSettled = Callable[[list[Verdict]], None]  # receives a verdict for each heartbeat of a ticket; must not raise


class Ticket:
    """Heartbeats whose verdicts one caller waits for. A ticket is settled exactly once; later verdicts are ignored."""

    __slots__ = ("admitted_at", "heartbeats", "on_settled", "size")

    def __init__(self, heartbeats: Sequence[Heartbeat], size: int, admitted_at: float, on_settled: OnSettled) -> None:
        self.heartbeats = heartbeats
        self.size = size
        self.admitted_at = admitted_at  # s, time.monotonic(): the event loop's clock
        self.on_settled = on_settled  # called, not awaited: a future and its task would cost 4 µs per heartbeat


class Intake:
    """Admit heartbeats, pass the waiting ones to the writer, and count those that are unanswered."""

    def __init__(
        self,
        readiness: Readiness,
        *,
        max_items: int,
        max_bytes: int,
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._readiness = readiness
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.received = 0  # heartbeats that arrived, admitted or not
        self._received_counted = 0
        self._waiting: deque[Ticket] = deque()
        self._unanswered: dict[Ticket, None] = {}  # oldest first
        self._items = 0
        self._bytes = 0
        self._arrived: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._random_fraction = random_fraction

    @property
    def items(self) -> int:
        """The number of heartbeats that are admitted and unanswered."""
        return self._items

    @property
    def bytes(self) -> int:
        """The total size of the heartbeats that are admitted and unanswered, in bytes."""
        return self._bytes

    @property
    def has_waiting(self) -> bool:
        """Whether a ticket waits for the writer."""
        return bool(self._waiting)

    @property
    def fill_ratio(self) -> float:
        """The larger of the fill ratios by items and by bytes: 0 to 1, or slightly more."""
        return max(self._items / self.max_items, self._bytes / self.max_bytes)

    def check(self, items: int = 1) -> None:
        """Raise Overloaded if `items` more heartbeats would not be admitted. Called before a body is read.

        An empty intake admits any number of heartbeats, because a request with more than the limit could otherwise
        never be admitted.
        """
        if refusal := self._readiness.refusal:
            raise Overloaded(refusal)
        if (self._items and self._items + items > self.max_items) or self._bytes >= self.max_bytes:
            raise Overloaded(f"{self._items} heartbeats ({self._bytes} bytes) wait to be committed.")

    @property
    def has_room(self) -> bool:
        """Whether another heartbeat would be admitted."""
        return self._items < self.max_items and self._bytes < self.max_bytes and not self._readiness.refusal

    def retry_after_s(self) -> int:
        """Return a random delay of 2 to 12 s, so that the devices of a fleet do not all retry at once."""
        return 2 + int(10 * self._random_fraction())

    def admit(self, heartbeats: Sequence[Heartbeat], size: int, on_settled: OnSettled) -> Ticket:
        """Queue heartbeats of `size` bytes, all of them or none. Raise Overloaded if they exceed the limits."""
        self.check(len(heartbeats))
        # Not the loop's time: get_running_loop() makes a system call (getpid), 1 µs per heartbeat.
        ticket = Ticket(heartbeats, size, time.monotonic(), on_settled)
        self._unanswered[ticket] = None
        self._items += len(heartbeats)
        self._bytes += size
        self._waiting.append(ticket)
        self._idle.clear()
        self.wake()
        return ticket

    def submit(self, heartbeats: Sequence[Heartbeat], size: int) -> asyncio.Future[list[Verdict]]:
        """Queue heartbeats like `admit`, and return a future of their verdicts."""
        future: asyncio.Future[list[Verdict]] = asyncio.get_running_loop().create_future()

        def on_settled(verdicts: list[Verdict]) -> None:
            if not future.done():  # the future is done already if the handler was cancelled
                future.set_result(verdicts)

        self.admit(heartbeats, size, on_settled)
        return future

    async def wait(self, timeout_s: float) -> None:
        """Wait until a ticket arrives, `wake` is called or `timeout_s` has passed. Only the writer may wait."""
        if self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._arrived = loop.create_future()
        # Not asyncio.wait_for, which creates a task for each wait: under light load, one per heartbeat.
        timer = loop.call_later(timeout_s, self.wake)
        try:
            await self._arrived
        finally:
            timer.cancel()
            self._arrived = None

    def wake(self) -> None:
        """End the current `wait`."""
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def next_batch(self, max_heartbeats: int) -> list[Ticket]:
        """Remove and return waiting tickets with up to `max_heartbeats` heartbeats in all, but at least one ticket.
        Tickets that were settled while they waited are dropped."""
        batch: list[Ticket] = []
        waiting = self._waiting
        while waiting:
            ticket = waiting[0]
            if ticket in self._unanswered:
                max_heartbeats -= len(ticket.heartbeats)
                if max_heartbeats < 0 and batch:
                    break
                batch.append(ticket)
            waiting.popleft()
        return batch

    async def wait_idle(self) -> None:
        """Wait until every admitted heartbeat is answered."""
        await self._idle.wait()

    def settle(self, tickets: Sequence[Ticket], verdicts: Sequence[Verdict]) -> None:
        """Settle the tickets with one verdict for each of their heartbeats. A ticket that is settled already keeps its
        verdicts."""
        if len(verdicts) != sum(len(ticket.heartbeats) for ticket in tickets):
            raise ValueError("the number of verdicts differs from the number of heartbeats")
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
                ticket.on_settled(own)
            except Exception:  # a failing callback must not keep the verdicts from the other tickets
                _log.exception("intake.not_told")
        if not self._unanswered:
            self._idle.set()
        for verdict, count in _counts(counted):
            _COUNTERS[verdict.outcome].inc(count)

    def fail(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Settle the tickets as failed, so that the devices keep their heartbeats and send them again."""
        self.settle(tickets, [Verdict(Outcome.FAILED, reason)] * sum(len(ticket.heartbeats) for ticket in tickets))

    def expire(self, now: float, after_s: float) -> None:
        """Fail the tickets that have waited longer than `after_s` at `now` (the loop's clock)."""
        late = list(takewhile(lambda ticket: now - ticket.admitted_at > after_s, self._unanswered))
        if late:
            self.fail(late, "not committed in time")
            # While the database is away, the writer takes no tickets: the settled ones must not make the queue grow.
            self._waiting = deque(t for t in self._waiting if t in self._unanswered)

    def fail_all(self, reason: str) -> None:
        """Fail every unanswered ticket."""
        self._waiting.clear()
        self.fail(list(self._unanswered), reason)

    def observe(self) -> None:
        """Update the metrics. Called at intervals, because a counter's lock would cost 1 µs per heartbeat."""
        metrics.heartbeats_ingested.inc(self.received - self._received_counted)
        self._received_counted = self.received
        metrics.intake_items.set(self._items)
        metrics.intake_bytes.set(self._bytes)
        metrics.intake_filled.set(self.fill_ratio)


def _counts(verdicts: list[Verdict]) -> Iterator[tuple[Verdict, int]]:
    """Yield verdicts with their counts. Nearly all are WRITTEN or DEDUPLICATED, which are counted fast."""
    common = 0
    for verdict in (WRITTEN, DEDUPLICATED):
        if count := verdicts.count(verdict):
            yield verdict, count
            common += count
    if common < len(verdicts):
        for verdict in verdicts:
            if verdict is not WRITTEN and verdict is not DEDUPLICATED:
                yield verdict, 1


_COUNTERS = {
    Outcome.WRITTEN: metrics.hb_writes,
    Outcome.DEDUPLICATED: metrics.hb_dedupe,
    Outcome.REFUSED: metrics.heartbeats_refused.labels(reason="database"),
    Outcome.FAILED: metrics.heartbeats_failed.labels(reason="uncommitted"),
}
