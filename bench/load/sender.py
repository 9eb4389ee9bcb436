"""The base class of `Stream` and `Agents`: the target, counts, connections, tasks, timeouts, the result."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import math
import os
import resource
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from bench.cost import Cost
from bench.fleet import MICROS
from bench.load.connection import Connection, Response
from bench.report import Outcome, Result, SendLog, percentiles

# the agent's timeout for a response
TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    """A numeric loopback address, and the path to which heartbeats are sent."""

    host: str
    port: int
    path: str = "/v1/heartbeat"
    media: str = "application/json"

    def head(self, token: str) -> bytes:
        """Return a request's head up to the value of `Content-Length`."""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: {self.media}\r\n"
            "Connection: Keep-Alive\r\nUser-Agent: okhttp/4.12.0\r\nContent-Length: "
        ).encode()

    def greeting(self) -> bytes:
        """Return a request to which any server responds, at least with 404."""
        return f"GET /healthz HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode()


def target(url: str) -> Target:
    """Parse a base URL. Raises ValueError unless its address is localhost or in 127.0.0.0/8: load stays here."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is not an http:// URL")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    try:
        loopback = ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        reason = "is not a loopback address: load is sent to 127.0.0.0/8 or localhost only"
        raise ValueError(f"{parts.hostname} {reason}")
    path = parts.path.rstrip("/").removesuffix("/v1/heartbeat")
    return Target(host, parts.port or 80, f"{path}/v1/heartbeat")


def raise_open_files() -> int:
    """Raise the soft limit of open files of this process to the hard limit; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_048_576 if hard == resource.RLIM_INFINITY else hard


class Alarm:
    """A timerfd, which wakes within 0.1 ms (median 0.045, p99 0.08); uvloop's timers round to whole milliseconds, which
    would add up to half a millisecond to every latency."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        # CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC
        self._fd: int = self._libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop.add_reader(self._fd, self._ring)

    async def until(self, at_s: float) -> None:
        """Sleep until `time.monotonic()` is `at_s`."""
        if at_s <= time.monotonic():
            return
        fraction, whole = math.modf(at_s)
        # struct itimerspec: interval (0, 0), then the instant in seconds and nanoseconds
        spec = (ctypes.c_long * 4)(0, 0, int(whole), int(fraction * 1e9))
        self._woken = self._loop.create_future()
        self._libc.timerfd_settime(self._fd, 1, ctypes.byref(spec), None)
        await self._woken

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def close(self) -> None:
        """Close the timer."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A run: its figures, and every send for the comparison with the database."""

    result: Result
    sends: SendLog
    # the start in seconds since 1970, from which due times count
    began_at_s: float


class Sender:
    """A log, counts, connections, tasks, and a sweep that cuts connections whose response is overdue.

    While the sender is entered (`async with`), objects that existed before are exempt from garbage collection.
    """

    def __init__(self, to: Target, timeout_s: float) -> None:
        self._to = to
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._start_s = time.monotonic()
        self.log = SendLog()
        self.late_us: list[int] = []
        # numbers of requests, of requests with a 2xx, and of connections that were opened
        self.sent = self.ok = self.deduplicated = self.opened = 0
        self.statuses: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        raise_open_files()
        self.alarm = Alarm()
        gc.collect()
        gc.freeze()
        self._spawn(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut every connection and end every task."""
        self._closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        for conn in tuple(self._connections):
            conn.drop("done")
        await asyncio.gather(*tasks, return_exceptions=True)
        gc.unfreeze()
        self.alarm.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a coroutine until the sender is left."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> Connection | str:
        """Open a connection; return the reason if that fails."""
        try:
            async with asyncio.timeout(self._timeout_s):
                _, conn = await self._loop.create_connection(
                    lambda: Connection(self._lost), self._to.host, self._to.port
                )
        except TimeoutError:
            return "connect timeout"
        except OSError as error:
            return f"connect {os.strerror(error.errno) if error.errno else error}"
        self.opened += 1
        self._connections.add(conn)
        return conn

    def _lost(self, conn: Connection) -> None:
        """Forget a connection that was closed."""
        self._connections.discard(conn)

    async def _sweep(self) -> None:
        """Look for overdue responses 60 times per timeout: with the agent's timeout of 30 s, every half second."""
        while True:
            await asyncio.sleep(self._timeout_s / 60)
            overdue_s = time.monotonic() - self._timeout_s
            for conn in [conn for conn in self._connections if conn.reply and conn.asked_s <= overdue_s]:
                conn.drop("timeout")

    def _count(self, response: Response) -> Outcome:
        """Count a response or a failure."""
        if not response.status:
            self.failures[response.failure] += 1
            return Outcome.FAILED
        self.statuses[response.status] += 1
        if not 200 <= response.status < 300:
            return Outcome.REFUSED
        self.ok += 1
        self.deduplicated += response.deduplicated
        return Outcome.DEDUPLICATED if response.deduplicated else Outcome.WRITTEN

    def result(  # noqa: PLR0917 - what a result has
        self,
        mode: str,
        devices: int,
        duration_s: float,
        cost: Cost,
        window: SendLog,
        extra: Mapping[str, float | int | None] | None = None,
    ) -> Result:
        """Return the result of a run; latencies, rate and cost are those of the sends in `window`."""
        latency, late = percentiles(window.latencies()), percentiles([us / MICROS for us in self.late_us])

        def per_send(seconds: float) -> float | None:
            return None if math.isnan(seconds) else round(seconds * 1e6 / max(1, len(window)), 1)

        return Result(
            mode=mode,
            devices=devices,
            duration_s=round(duration_s, 3),
            sent=self.sent,
            ok=self.ok,
            refused=self.statuses.total() - self.ok,
            failed=self.failures.total(),
            deduplicated=self.deduplicated,
            **asdict(latency),
            rate_per_s=round(window.acknowledged / cost.at_s, 1),
            statuses={str(status): number for status, number in sorted(self.statuses.items())},
            failures=dict(self.failures),
            late_sends_p99_ms=late.p99_ms,
            connections_opened=self.opened,
            generator_us=per_send(cost.generator_s),
            daemon_us=per_send(cost.daemon_s),
            postgres_us=per_send(cost.postgres_s),
            daemon_cores=None if math.isnan(cost.daemon_s) else round(cost.daemon_s / cost.at_s, 3),
            others_cores=cost.others_cores,
            extra=extra or {},
        )
