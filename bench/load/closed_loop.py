"""Closed loop: as fast as it goes, each connection sending the next request when the last was answered."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from bench.cost import Cost, cost_now, per_heartbeat
from bench.fleet import Device
from bench.load.connection import IDLE, Connection, Head
from bench.load.pool import RATE_BOUND, RequestPool, Requests, Span, recent_span
from bench.load.sender import TIMEOUT_S, LoadRun, Sender, bucket_start_us, make_result, measured_run
from bench.load.target import Target
from bench.report import Outcome, percentiles


class _Mark(NamedTuple):
    """Where a closed loop stood at an instant."""

    at_s: float
    ok: int
    sent: int
    cost: Cost


class ClosedLoop(Sender):
    """Connections that each send the next request when the last was answered."""

    _REOPEN_S: Final = 0.05

    def __init__(
        self, to: Target, pool: Requests, *, timeout_s: float, pid: int | None, beside: int | None = None
    ) -> None:
        """Prepare."""
        super().__init__(to, timeout_s)
        self._pool = pool
        self._pid = pid
        self._beside = beside
        self._running = True
        self._asked_s: dict[Connection, float] = {}
        self._exhausted = asyncio.Event()
        self._quiet = asyncio.Event()

    def connected(self, conn: Connection) -> None:
        """Start sending."""
        self._made(conn)
        self._next(conn)

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """Note the answer and send the next."""
        now = time.monotonic()
        outcome = self.tally.outcome(head, deduplicated)
        self.log.outcome[send_no] = outcome
        asked_s = self._asked_s.pop(conn)
        if outcome is not Outcome.REFUSED:
            self.log.latency_s[send_no] = now - asked_s
        if not conn.closing:
            self._next(conn)
        elif not self._asked_s:
            self._quiet.set()

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """Note the failure and open another connection."""
        self._connections.discard(conn)
        self._asked_s.pop(conn, None)
        if send_no != IDLE:
            self.log.outcome[send_no] = Outcome.FAILED
            self.tally.failures[reason] += 1
        if self._running:
            self._spawn(self._connect(conn.lane, self._REOPEN_S if send_no != IDLE else 0.0))
        elif not self._asked_s:
            self._quiet.set()

    async def run(self, connections: int, warm_s: float, duration_s: float) -> tuple[_Mark, _Mark]:
        """Send for `duration_s`; where it stood after `warm_s` and at the end."""
        self._spawn(self._sweep())
        for lane in range(connections):
            self._spawn(self._connect(lane, 0.0))
        await self._wait(warm_s)
        warm = self._mark()
        await self._wait(duration_s - warm_s)
        end = self._mark()
        self._running = False
        self._quiet.clear()
        if self._asked_s:
            await asyncio.wait_for(self._quiet.wait(), self._timeout_s * 1.1 + 5)
        return warm, end

    async def _wait(self, seconds: float) -> None:
        """Wait, shorter if the pool runs out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exhausted.wait(), seconds)

    def _mark(self) -> _Mark:
        return _Mark(time.monotonic(), self.tally.ok, self.tally.sent, cost_now(self._pid, self._beside))

    def _next(self, conn: Connection) -> None:
        if self._running and len(self.log) < len(self._pool):
            device, ts_us, request = self._pool.request(len(self.log))
            send_no = self.log.add(device, ts_us)
            self.tally.sent += 1
            self._asked_s[conn] = time.monotonic()
            conn.send(send_no, request)
            return
        if self._running:
            self._exhausted.set()
        if not self._asked_s:
            self._quiet.set()

    async def _connect(self, lane: int, after_s: float) -> None:
        """Open a connection, again and again while the run lasts; a failed attempt is a failed send."""
        await asyncio.sleep(after_s)
        while self._running and (reason := await self._connection(self, lane)) is not None:
            self.tally.sent += 1
            self.tally.failures[reason] += 1
            await asyncio.sleep(self._REOPEN_S)

    def _expire(self, asked_before_s: float) -> None:
        """Cut connections whose answer is overdue; `lost` then counts the failure."""
        for conn in [conn for conn, asked_s in self._asked_s.items() if asked_s <= asked_before_s]:
            conn.drop("timeout")


async def closed_loop(
    to: Target,
    fleet: Sequence[Device],
    *,
    connections: int = 64,
    duration_s: float = 10.0,
    warm_s: float = 2.0,
    span: Span | None = None,
    requests: Requests | None = None,
    timeout_s: float = TIMEOUT_S,
    pid: int | None = None,
    beside: int | None = None,
) -> LoadRun:
    """Send as fast as it goes over `connections` for `duration_s`, nothing to be deduplicated.

    `span` are the buckets of its keys, by default the newest ones; a second run on the same data wants later ones.
    `requests` are sent instead of heartbeats made of it. `pid` is the server's, for its CPU time; `beside` is a process
    that works for it without being its child.

    Rate, latencies and CPU are those of the steady window: from `warm_s` to the end. Latencies count from the
    actual send, as a closed loop has no other: they say what a request costs, not what a fleet would wait.
    """
    warm_s = min(warm_s, duration_s / 2)
    if requests is None:
        span = span or recent_span(round(RATE_BOUND * duration_s), len(fleet), bucket_start_us())
        requests = RequestPool(to, fleet, span)
    async with measured_run():
        loop = ClosedLoop(to, requests, timeout_s=timeout_s, pid=pid, beside=beside)
        try:
            warm, end = await loop.run(connections, warm_s, duration_s)
        finally:
            await loop.close()
    window_s, sends = end.at_s - warm.at_s, end.sent - warm.sent
    cost = end.cost.since(warm.cost)
    steady = [value for value in loop.log.latency_s[warm.sent :] if not math.isnan(value)]
    each = per_heartbeat(cost, sends)
    extra: dict[str, float | int | None] = {
        "connections": connections,
        "window_s": round(window_s, 3),
        "window_sends": sends,
        "window_generator_cpu_share": round(cost.generator_s / window_s, 3),
        "window_daemon_cpu_us": each.daemon_us,
        "window_postgres_cpu_us": each.postgres_us,
        "window_server_cpu_share": None if cost.server_s is None else round(cost.server_s / window_s, 3),
    }
    result = make_result(
        "closed loop",
        len(fleet),
        duration_s,
        tally=loop.tally,
        spread=percentiles(steady),
        cost=cost,
        rate_per_s=(end.ok - warm.ok) / window_s,
        cost_sends=sends,
        extra=extra,
    )
    return LoadRun(result, loop.log)
