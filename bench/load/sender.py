"""What the ways to send share: counts, connections, tasks, the hunt for late answers, the result."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final

from bench.cost import Cost
from bench.fleet import BUCKET_US, MICROS
from bench.load.alarm import Alarm
from bench.load.connection import Connection, Head, Owner
from bench.load.target import Target, raise_open_files
from bench.report import Outcome, Percentiles, Result, SendLog, percentiles

# what the agent waits for an answer
TIMEOUT_S: Final = 30.0
# told every so often: requests sent, and acknowledged
Progress = Callable[[int, int], None]


class Tally:
    """Counts of answers and failures; latencies and outcomes go to the log."""

    def __init__(self) -> None:
        self.sent = 0
        self.ok = 0
        self.deduplicated = 0
        self.statuses: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.connections = 0

    def outcome(self, head: Head, deduplicated: bool) -> Outcome:
        """Count an answer."""
        self.statuses[head.status] += 1
        if not 200 <= head.status < 300:
            return Outcome.REFUSED
        self.ok += 1
        if not deduplicated:
            return Outcome.WRITTEN
        self.deduplicated += 1
        return Outcome.DEDUPLICATED

    def add(self, other: Tally) -> None:
        """Take in another tally."""
        self.sent += other.sent
        self.ok += other.ok
        self.deduplicated += other.deduplicated
        self.statuses += other.statuses
        self.failures += other.failures
        self.connections += other.connections

    @property
    def failed(self) -> int:
        """Sends without an answer."""
        return self.failures.total()

    @property
    def refused(self) -> int:
        """Answers that were no 2xx."""
        return self.statuses.total() - self.ok


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A run: the figures, and every send for a check against the database."""

    result: Result
    sends: SendLog
    # seconds since 1970 at its start, from which intended times count
    began_at_s: float = 0.0


@contextlib.asynccontextmanager
async def measured_run() -> AsyncIterator[Alarm]:
    """Files, timer and garbage collection set for a run: what lives already is not walked again and again."""
    raise_open_files()
    alarm = Alarm()
    gc.collect()
    gc.freeze()
    try:
        yield alarm
    finally:
        gc.unfreeze()
        alarm.close()


def bucket_start_us() -> int:
    """The first instant of the current bucket, µs since 1970: what schedules count from."""
    now_us = time.time_ns() // 1000
    return now_us - now_us % BUCKET_US


class Sender:
    """What the ways to send share: log, tally, connections, tasks, and the hunt for late answers."""

    def __init__(self, to: Target, timeout_s: float) -> None:
        self._to = to
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.log = SendLog()
        self.tally = Tally()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run something until `close`."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, owner: Owner, lane: int) -> str | None:
        """Open a connection for the owner; the reason if it could not be."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._loop.create_connection(lambda: Connection(owner, lane), self._to.host, self._to.port)
        except TimeoutError:
            return "connect timeout"
        except OSError as error:
            return f"connect {os.strerror(error.errno) if error.errno else error}"
        return None

    def _made(self, conn: Connection) -> None:
        """Note a new connection."""
        self.tally.connections += 1
        self._connections.add(conn)

    async def _sweep(self) -> None:
        """Look for late answers every 1/60 of the timeout: each half second for the agent's 30 s."""
        while True:
            await asyncio.sleep(self._timeout_s / 60)
            self._expire(time.monotonic() - self._timeout_s)

    async def _tell(self, progress: Progress) -> None:
        """Say twice a second how far it is."""
        while True:
            await asyncio.sleep(0.5)
            progress(self.tally.sent, self.tally.ok)

    def _expire(self, asked_before_s: float) -> None:
        """Give up what was asked before this instant (monotonic)."""
        raise NotImplementedError

    async def close(self) -> None:
        """Cut every connection and end every task."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        for conn in tuple(self._connections):
            conn.drop("done")
        await asyncio.gather(*tasks, return_exceptions=True)


def make_result(
    mode: str,
    devices: int,
    duration_s: float,
    *,
    tally: Tally,
    spread: Percentiles,
    cost: Cost,
    rate_per_s: float,
    cost_sends: int | None = None,
    late_us: Sequence[int] = (),
    extra: dict[str, float | int | None] | None = None,
) -> Result:
    """Put a run's counts together; `cost_sends` are the sends that the cost is of, when not all."""
    late = percentiles([us / MICROS for us in late_us])
    return Result(
        mode=mode,
        devices=devices,
        duration_s=duration_s,
        sent=tally.sent,
        ok=tally.ok,
        refused=tally.refused,
        failed=tally.failed,
        deduplicated=tally.deduplicated,
        p50_ms=spread.p50_ms,
        p95_ms=spread.p95_ms,
        p99_ms=spread.p99_ms,
        max_ms=spread.max_ms,
        rate_per_s=round(rate_per_s, 1),
        statuses={str(status): number for status, number in sorted(tally.statuses.items())},
        failures=dict(tally.failures),
        late_sends_p99_ms=late.p99_ms,
        late_sends_max_ms=late.max_ms,
        connections_opened=tally.connections,
        generator_cpu_s=round(cost.generator_s, 3),
        generator_cpu_us_per_send=round(
            cost.generator_s * 1e6 / max(1, tally.sent if cost_sends is None else cost_sends), 1
        ),
        server_cpu_s=cost.server_s,
        server_tree_cpu_s=cost.server_tree_s,
        extra={**(extra or {}), "others_cores": cost.others_cores},
    )
