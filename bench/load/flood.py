"""Flood: stages of an open loop at a rate each, on connections that anybody shares; what came of every send is kept.

`open_loop` gives each device its own connection and a body made at its time, 30 µs a send. Here a request is spliced
from parts (`pool`), 12 µs with its answer, so that the generator can send twice what the daemon takes beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import random
import re
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

from bench.cost import Cost, cost_now
from bench.fleet import MICROS, Device
from bench.load.alarm import Alarm
from bench.load.connection import IDLE, Connection, Head
from bench.load.pool import RequestPool, Requests, Span
from bench.load.sender import TIMEOUT_S, LoadRun, Sender, make_result, measured_run
from bench.load.target import Target
from bench.report import Outcome, SendLog, percentiles

_CONNECTING_AT_ONCE: Final = 64
# sends between two looks at the sockets, when the generator has fallen behind
_BURST: Final = 64
# stands for a send that is none: the first request of a connection, opened before the start
_GREETING: Final = -2
_NEXT: Final = re.compile(rb'"next_heartbeat_seconds":\s*(\d+)')


class Stage(NamedTuple):
    """So many sends a second for so long."""

    name: str
    rate_per_s: float
    duration_s: float


def due_us(stages: Sequence[Stage], seed: int) -> array[int]:
    """When each send is due, in µs from the start: evenly in its stage, each at a random place of its own interval.

    Not Poisson: over a stretch of a second it would be, and the figure "twice the capacity" would be a mean.
    """
    rng = random.Random(f"nexhb flood:{seed}")
    found, start_us = array("q"), 0.0
    for stage in stages:
        interval_us = MICROS / stage.rate_per_s
        sends = round(stage.rate_per_s * stage.duration_s)
        found.extend(int(start_us + interval_us * (n + rng.random())) for n in range(sends))
        start_us += stage.duration_s * MICROS
    return found


@lru_cache(maxsize=1024)
def next_heartbeat_s(body: bytes) -> int:
    """What an accepted device is told, 0 where it is told nothing. Cached: there are a few hundred such bodies."""
    found = _NEXT.search(body)
    return int(found[1]) if found else 0


@dataclass(slots=True)
class Record:
    """Every send: `sends` for the comparison with the database (its latencies are left out), and the rest by send."""

    sends: SendLog = field(default_factory=SendLog)
    due_us: array[int] = field(default_factory=lambda: array("q"))
    # from then to the answer, also to a refusal: how long a device waits for its 503 is the daemon's to bound
    took_s: array[float] = field(default_factory=lambda: array("f"))
    # HTTP status; 0 where no answer came
    status: array[int] = field(default_factory=lambda: array("h"))
    # seconds: next_heartbeat_seconds of a 2xx, Retry-After of anything else
    told_s: array[int] = field(default_factory=lambda: array("h"))
    # due, and not sent: every connection waited for an answer
    held_back_us: array[int] = field(default_factory=lambda: array("q"))
    late_us: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        """How many sends."""
        return len(self.due_us)


class Flood(Sender):
    """Sends at its times on whichever connection is free. One that is due while none is free is not sent, but counted:
    a device that waits for an answer does not send either."""

    def __init__(self, to: Target, pool: Requests, due: array[int], *, timeout_s: float) -> None:
        """Prepare."""
        super().__init__(to, timeout_s)
        self.record = Record(sends=self.log)
        # of each stage
        self.costs: list[Cost] = []
        self._pool = pool
        self._due = due
        self._idle: deque[Connection] = deque()
        # sends without an answer, oldest first
        self._inflight: dict[int, Connection] = {}
        self._greetings = 0
        self._greeted = asyncio.Event()
        self._settled = asyncio.Event()
        self._dispatched = False
        self._start_s = 0.0

    # the owner's side: what connections report

    def connected(self, conn: Connection) -> None:
        """Ask for something at once: the daemon cuts a connection on which no request comes."""
        self._made(conn)
        self._greetings += 1
        self._greeted.clear()
        conn.send(_GREETING, self._to.greeting())

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """Note it and keep the connection."""
        now = time.monotonic()
        if send_no == _GREETING:
            self._greeting_over()
        elif self._inflight.pop(send_no, None) is not None:
            outcome = self.tally.outcome(head, deduplicated)
            self.log.outcome[send_no] = outcome
            self.record.status[send_no] = head.status
            self.record.took_s[send_no] = now - self._start_s - self.record.due_us[send_no] / MICROS
            accepted = outcome is not Outcome.REFUSED
            self.record.told_s[send_no] = next_heartbeat_s(conn.body) if accepted else int(head.retry_after_s)
            self._check_settled()
        if not conn.closing:
            self._idle.append(conn)

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """Note what was on it, and open another."""
        self._connections.discard(conn)
        with contextlib.suppress(ValueError):
            self._idle.remove(conn)
        if send_no == _GREETING:
            self._greeting_over()
        elif send_no != IDLE and self._inflight.pop(send_no, None) is not None:
            self.log.outcome[send_no] = Outcome.FAILED
            self.tally.failures[reason] += 1
            self._check_settled()
        if not self._dispatched:
            self._spawn(self._open())

    # sending

    async def preconnect(self, connections: int) -> None:
        """Open all connections; each asks for /healthz."""
        slots = asyncio.Semaphore(_CONNECTING_AT_ONCE)

        async def one() -> None:
            async with slots:
                await self._open()

        await asyncio.gather(*(one() for _ in range(connections)))
        async with asyncio.timeout(self._timeout_s):
            await self._greeted.wait()

    async def run(self, start_s: float, stage_ends_s: Sequence[float], mark: Callable[[], Cost], alarm: Alarm) -> None:
        """Send all from `start_s` (monotonic) on, and wait for the answers; read the cost at each stage's end."""
        self._start_s = start_s
        self._spawn(self._sweep())
        before = mark()
        ends = itertools.chain(stage_ends_s, itertools.repeat(float("inf")))
        end_s = next(ends)
        at, count = 0, len(self._due)
        while at < count:
            now_us = int((time.monotonic() - start_s) * MICROS)
            if now_us >= end_s * MICROS:
                after = mark()
                self.costs.append(after.since(before))
                before, end_s = after, next(ends)
            burst_end = min(count, at + _BURST)
            while at < burst_end and self._due[at] <= now_us:
                self._dispatch(self._due[at], now_us)
                at += 1
            if at < count and self._due[at] > now_us:
                await alarm.until(start_s + self._due[at] / MICROS)
            else:
                await asyncio.sleep(0)
        self.costs.append(mark().since(before))
        self._dispatched = True
        self._check_settled()
        # every send is settled by its answer, its loss or the sweeper: the bound is for a bug here
        await asyncio.wait_for(self._settled.wait(), self._timeout_s * 1.1 + 5)

    def _dispatch(self, due: int, now_us: int) -> None:
        if not self._idle:
            self.record.held_back_us.append(due)
            return
        device, ts_us, request = self._pool.request(len(self.log))
        send_no = self.log.add(device, ts_us)
        record = self.record
        record.due_us.append(due)
        record.late_us.append(now_us - due)
        record.took_s.append(math.nan)
        record.status.append(0)
        record.told_s.append(0)
        self.tally.sent += 1
        # the one that has been idle for longest: a fleet's connections are all in use
        conn = self._idle.popleft()
        self._inflight[send_no] = conn
        conn.send(send_no, request)

    async def _open(self) -> None:
        if reason := await self._connection(self, 0):
            self.tally.failures[reason] += 1

    def _greeting_over(self) -> None:
        self._greetings -= 1
        if self._greetings == 0:
            self._greeted.set()

    def _check_settled(self) -> None:
        if self._dispatched and not self._inflight:
            self._settled.set()

    def _expire(self, asked_before_s: float) -> None:
        """Cut connections whose answer is overdue; `lost` then counts the failure."""
        horizon_us = int((asked_before_s - self._start_s) * MICROS)
        due = self.record.due_us
        for send_no in list(itertools.takewhile(lambda no: due[no] <= horizon_us, self._inflight)):
            self._inflight[send_no].drop("timeout")


@dataclass(frozen=True, slots=True)
class Flooded:
    """A run, what was heard by send, and what each stage cost."""

    run: LoadRun
    record: Record
    costs: tuple[Cost, ...]


async def flood(
    to: Target,
    fleet: Sequence[Device],
    stages: Sequence[Stage],
    keys: Span | Requests,
    *,
    connections: int,
    timeout_s: float = TIMEOUT_S,
    pid: int | None = None,
    beside: int | None = None,
    seed: int = 0,
    started: Callable[[], None] = lambda: None,
) -> Flooded:
    """Send stage after stage; `started` is called when all connections are open and the first send is due.

    `keys` are the buckets of the fleet's heartbeats, or the requests themselves. `pid` is the server's, for its CPU
    time; `beside` is a process that belongs to the run and is neither it nor the generator.
    Latencies count from the intended times, and those of the result cover every stage.
    """
    pool, due = RequestPool(to, fleet, keys) if isinstance(keys, Span) else keys, due_us(stages, seed)
    if len(due) > len(pool):
        raise ValueError(f"{len(due)} sends want more than the {len(pool)} requests there are")
    ends_s = list(itertools.accumulate(stage.duration_s for stage in stages))[:-1]
    async with measured_run() as alarm:
        loop = Flood(to, pool, due, timeout_s=timeout_s)
        try:
            await loop.preconnect(connections)
            # the kernel shakes hands before the server accepts: thousands still lie in its backlog
            await asyncio.sleep(0.5)
            # thousands of connections would be walked again and again
            gc.freeze()
            started()
            await loop.run(time.monotonic(), ends_s, lambda: cost_now(pid, beside), alarm)
        finally:
            await loop.close()
    record = loop.record
    accepted = [took for took, status in zip(record.took_s, record.status, strict=True) if status == 200]
    total = Cost(*(sum(each) for each in zip(*(_known(cost) for cost in loop.costs), strict=True)))
    duration_s = sum(stage.duration_s for stage in stages)
    result = make_result(
        "flood",
        len(fleet),
        duration_s,
        tally=loop.tally,
        spread=percentiles(accepted),
        cost=total,
        rate_per_s=loop.tally.ok / duration_s,
        late_us=record.late_us,
        extra={"connections": connections, "held_back": len(record.held_back_us)},
    )
    return Flooded(LoadRun(result, record.sends), record, tuple(loop.costs))


def _known(cost: Cost) -> tuple[float, ...]:
    """Its clocks, 0 for one that could not be read."""
    return cost.generator_s, cost.server_s or 0.0, cost.server_tree_s or 0.0, cost.machine_s, cost.at_s, cost.beside_s
