"""Send a stream of requests: in open loop each when it is due, in closed loop as fast as possible."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from bench.cost import Cost, cost_now
from bench.fleet import MICROS
from bench.load.connection import Connection, Response
from bench.load.requests import Requests
from bench.load.sender import TIMEOUT_S, LoadRun, Sender, Target, raise_open_files

# requests per second, more than nexhb accepts on two cores: a closed loop has enough keys for this rate
RATE_BOUND: Final = 45_000
# limit of connections that are being opened at the same time
_CONNECTING: Final = 64
# limit of sends between two rounds of the event loop while the generator is late
_BURST: Final = 64
# connections per device if their number is not given: one, and three more while the first waits for a response
_PER_DEVICE: Final = 4
_REOPEN_S: Final = 0.05


def due_times(*stages: tuple[float, float]) -> array[int]:
    """Return the due time of each send, in µs from the start. The stages, each given as (sends per second, seconds),
    follow one another. A send is due at a random instant of its own interval.

    The sends are not a Poisson process: in such a process the number of sends per second varies, so that "twice the
    capacity" would hold only on average.
    """
    rng = random.Random("nexhb due")
    due, start_us = array("q"), 0.0
    for rate_per_s, duration_s in stages:
        sends, interval_us = round(rate_per_s * duration_s), MICROS / rate_per_s
        due.extend(int(start_us + interval_us * (n + rng.random())) for n in range(sends))
        start_us += duration_s * MICROS
    return due


class Stream(Sender):
    """Sends requests on connections that all devices share.

    In open loop a send takes the connection that has been idle for longest. If none is idle, another one is opened up
    to the limit, and the send waits. With `hold_back` the send does not wait; it is only counted and not made, since a
    device that waits for its response does not send either.
    """

    def __init__(self, to: Target, timeout_s: float, requests: Requests, max_connections: int, hold_back: bool) -> None:
        super().__init__(to, timeout_s)
        self._requests = requests
        self._max_connections = max_connections
        self._hold_back = hold_back
        self._idle: deque[Connection] = deque()
        self._opening = 0
        self._waiting: deque[tuple[int, bytes]] = deque()
        # in closed loop: each free connection sends the next request at once
        self._as_fast_as_possible = False
        self._unanswered = 0
        self._answer = asyncio.Event()
        self.held_back = 0

    async def preconnect(self, connections: int) -> None:
        """Open connections. Each sends a request, since a server may close a connection that sends none, and the first
        send of some devices is a minute away."""
        slots = asyncio.Semaphore(_CONNECTING)

        async def greet() -> None:
            async with slots:
                conn = await self._connect()
            if isinstance(conn, Connection):
                await conn.request(self._to.greeting())
                self._release(conn)

        await asyncio.gather(*(greet() for _ in range(connections)))
        # otherwise the garbage collector would traverse thousands of connections again and again
        gc.freeze()

    async def run(self, due_us: Sequence[int], until: asyncio.Event | None) -> None:
        """Send everything when it is due, counted from now. Once `until` is set, send nothing more."""
        self._start_s = time.monotonic()
        at, count = 0, len(due_us)
        while at < count and not (until is not None and until.is_set()):
            now_us = int((time.monotonic() - self._start_s) * MICROS)
            burst_end = min(count, at + _BURST)
            while at < burst_end and due_us[at] <= now_us:
                self._dispatch(due_us[at], now_us)
                at += 1
            if at < count and due_us[at] > now_us:
                await self.alarm.until(self._start_s + due_us[at] / MICROS)
            else:
                await asyncio.sleep(0)

    async def run_closed(self, duration_s: float) -> None:
        """Send as fast as possible for a time, or until every request was sent."""
        self._start_s, self._as_fast_as_possible = time.monotonic(), True
        for _ in range(len(self._idle)):
            self._release(self._idle.popleft())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                while len(self.log) < len(self._requests):
                    await self._next_answer()
        self._as_fast_as_possible = False

    async def all_answered(self) -> None:
        """Wait until every request has its outcome, at the latest at its timeout."""
        while self._unanswered:
            await self._next_answer()

    async def _next_answer(self) -> None:
        self._answer.clear()
        await self._answer.wait()

    def _request(self, due_us: int) -> tuple[int, bytes]:
        """Record the next request; return its number in the log and its bytes."""
        device, ts_us, request = self._requests.request(len(self.log))
        self.sent += 1
        self._unanswered += 1
        return self.log.add(device, ts_us, due_us), request

    def _dispatch(self, due_us: int, now_us: int) -> None:
        while self._idle and self._idle[0].closing:
            self._idle.popleft()
        if not self._idle and self._hold_back:
            self.held_back += 1
            return
        self.late_us.append(now_us - due_us)
        send_no, request = self._request(due_us)
        if self._idle:
            self._idle.popleft().ask(send_no, request, self._answered)
            return
        self._waiting.append((send_no, request))
        if len(self._connections) + self._opening < self._max_connections:
            self._spawn(self._open())

    def _release(self, conn: Connection) -> None:
        """Let a free connection send what has waited for longest, or the next request of a closed loop."""
        if conn.closing:
            return
        if self._waiting:
            conn.ask(*self._waiting.popleft(), self._answered)
        elif self._as_fast_as_possible and len(self.log) < len(self._requests):
            conn.ask(*self._request(int((time.monotonic() - self._start_s) * MICROS)), self._answered)
        else:
            self._idle.append(conn)

    def _answered(self, conn: Connection, response: Response) -> None:
        self._record(conn.send_no, response)
        self._release(conn)

    def _record(self, send_no: int, response: Response) -> None:
        self.log.outcome[send_no] = self._count(response)
        if response.status:
            self.log.latency_s[send_no] = time.monotonic() - self._start_s - self.log.due_us[send_no] / MICROS
        self._unanswered -= 1
        if not self._unanswered or len(self.log) == len(self._requests):
            self._answer.set()

    def _lost(self, conn: Connection) -> None:
        super()._lost(conn)
        if not self._closed and (self._waiting or self._hold_back or self._as_fast_as_possible):
            self._spawn(self._open())

    async def _open(self) -> None:
        """Open a connection, or fail the send that has waited for longest; a closed loop tries again."""
        self._opening += 1
        while isinstance(conn := await self._connect(), str) and (self._waiting or self._as_fast_as_possible):
            if self._waiting:
                self._record(self._waiting.popleft()[0], Response(0, failure=conn))
            else:
                await asyncio.sleep(_REOPEN_S)
        self._opening -= 1
        if isinstance(conn, Connection):
            self._release(conn)


async def stream(
    to: Target,
    requests: Requests,
    due_us: Sequence[int] | None = None,
    *,
    duration_s: float,
    warm_s: float = 0.0,
    connections: int | None = None,
    hold_back: bool = False,
    timeout_s: float = TIMEOUT_S,
    pids: Sequence[int] = (),
    beside: int | None = None,
    started: Callable[[], None] = lambda: None,
    until: asyncio.Event | None = None,
) -> LoadRun:
    """Send request n at `due_us[n]` µs after the start; without due times, send as fast as possible for `duration_s`.

    Latencies count from the due times. A closed loop has no due times: its latencies count from the actual send, so
    that they show the cost of a request and not the wait of a fleet. Its latencies, rate and CPU are those of the
    steady window, from `warm_s` to the end.

    The devices share `connections` connections (default: one for each device, and spares while these wait for a
    response), which are opened before the start; then `started` is called. `pids` are the server's processes, for its
    CPU time, and `beside` is a process that works for the server without being its child. Once `until` is set, nothing
    more is sent, and the result covers the sends so far.
    """
    if due_us is not None and len(due_us) > len(requests):
        raise ValueError(f"{len(due_us)} sends need more than the {len(requests)} requests there are")
    files = raise_open_files() - 128
    first = min(connections or requests.devices, files)
    limit = first if connections else min(_PER_DEVICE * requests.devices, files)
    costs: list[Cost] = []

    async def mark() -> None:
        await asyncio.sleep(warm_s)
        costs.append(cost_now(pids, beside))

    async with Stream(to, timeout_s, requests, limit, hold_back) as sender:
        await sender.preconnect(first)
        started()
        began_at_s, began_s, marking = time.time(), time.monotonic(), asyncio.create_task(mark())
        if due_us is None:
            await sender.run_closed(duration_s)
        else:
            await sender.run(due_us, until)
            await sender.all_answered()
            # the schedule may end with a time in which nothing is due
            await sender.alarm.until(0 if until else began_s + duration_s)
        await marking
        cost = cost_now(pids, beside).since(costs[0])
        await sender.all_answered()
    mode, window = "closed loop" if due_us is None else "open loop", sender.log.due_in(warm_s, math.inf)
    extra = {"held_back": sender.held_back} if hold_back else {}
    result = sender.result(mode, requests.devices, time.monotonic() - began_s, cost, window, extra)
    return LoadRun(result, sender.log, began_at_s)
