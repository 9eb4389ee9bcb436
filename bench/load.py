"""The load: a fleet's heartbeats over raw HTTP/1.1, cheap enough to share two cores with the server.

Three ways to send, one connection class:
- open loop: every send at its intended time, whatever became of the earlier ones; latency counts from it.
- agents: each device keeps a heartbeat until it is acknowledged, oldest first, and backs off in between.
- closed loop: as fast as it goes, each connection sending the next request when the last was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import itertools
import math
import os
import random
import resource
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TextIO
from urllib.parse import urlsplit

from bench.fleet import BUCKET_US, MICROS, Device, Replay, Schedule, body_us, second_text
from bench.report import Cost, Outcome, Percentiles, Result, SendLog, cost_now, percentiles

# what the agent waits for an answer
TIMEOUT_S: Final = 30.0
_IDLE: Final = -1
_ANSWER_BYTES: Final = 65_536
# connections a device may have at once: its own, and spares while that one waits for an answer
_PER_LANE: Final = 4
_CONNECTING_AT_ONCE: Final = 64
# sends between two looks at the sockets, when the generator has fallen behind
_BURST: Final = 64


class NotLoopbackError(ValueError):
    """The load generator only targets this machine."""


# ── target ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Target:
    """Where the heartbeats go: a numeric loopback address."""

    host: str
    port: int
    path: str = "/v1/heartbeat"

    def head(self, device: Device) -> bytes:
        """A request's head up to the number of `Content-Length`; not every agent names the charset."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        charset = "; charset=utf-8" if device.index % 3 else ""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Authorization: Bearer {device.token}\r\nContent-Type: application/json{charset}\r\n"
            "Connection: Keep-Alive\r\nUser-Agent: okhttp/4.12.0\r\nContent-Length: "
        ).encode()


def target(url: str) -> Target:
    """Read a base URL; anything but plain http on a loopback address is refused."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// URL")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise NotLoopbackError(
            f"{parts.hostname} is not a loopback address: load goes to 127.0.0.0/8, ::1 or localhost only"
        )
    path = parts.path.rstrip("/").removesuffix("/v1/heartbeat")
    return Target(host, parts.port or 80, f"{path}/v1/heartbeat")


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, for this process; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_048_576 if hard == resource.RLIM_INFINITY else hard


# ── one connection ───────────────────────────────────────────────────────────────────────────────────────


class Head(NamedTuple):
    """What matters of an answer's head; `fault` says why the answer cannot be read."""

    status: int
    length: int
    close: bool
    retry_after_s: float
    fault: str | None


def _fault(reason: str) -> Head:
    return Head(0, 0, True, 0.0, reason)


@lru_cache(maxsize=512)
def parse_head(raw: bytes) -> Head:
    """Read an answer's head (without the blank line). Cached: within one second most are the same bytes."""
    status_line, *lines = raw.split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
        return _fault("garbage")
    status = int(rest[:3])
    fields = {
        name.strip().lower(): value.strip().lower()
        for name, _, value in (line.partition(b":") for line in lines)
    }
    length = fields.get(b"content-length", b"")
    connection = fields.get(b"connection", b"")
    retry_after = fields.get(b"retry-after", b"")
    if b"transfer-encoding" in fields:
        return _fault("chunked")
    if status in (204, 304) or status < 200:
        length = b"0"
    if not length.isdigit():
        return _fault("no_length")
    if int(length) > _ANSWER_BYTES:
        return _fault("too_long")
    close = connection == b"close" or (version == b"HTTP/1.0" and connection != b"keep-alive")
    return Head(status, int(length), close, float(retry_after) if retry_after.isdigit() else 0.0, None)


class Owner(Protocol):
    """Who a connection reports to."""

    def connected(self, conn: Connection) -> None:
        """It may be written to."""

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """The answer to `send_no` came; the connection is free, unless `conn.closing`."""

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """It is gone; `send_no` is the request whose answer was awaited, or -1."""


class Connection(asyncio.Protocol):
    """An HTTP/1.1 client connection with one request at a time and a parser for small answers."""

    __slots__ = ("_rest", "_transport", "closing", "lane", "owner", "reason", "send_no")

    def __init__(self, owner: Owner, lane: int) -> None:
        """Belong to the owner's lane."""
        self.owner = owner
        self.lane = lane
        self.send_no = _IDLE
        self.closing = False
        self.reason = "closed"
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # a TCP transport is a Transport
        self.owner.connected(self)

    def send(self, send_no: int, request: bytes) -> None:
        """Write a request, whose answer will carry `send_no`."""
        self.send_no = send_no
        self._transport.write(request)  # type: ignore[union-attr]  # only a connected one is sent on

    def drop(self, reason: str) -> None:
        """Cut the connection; `lost` follows with this reason."""
        self.closing = True
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self.closing = True
        send_no, self.send_no = self.send_no, _IDLE
        if exc is not None and self.reason == "closed":
            self.reason = "reset"
        self.owner.lost(self, send_no, self.reason)

    def data_received(self, data: bytes) -> None:
        """Take in a piece of an answer."""
        if self._rest:
            data = self._rest + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._keep(data, None if b"HTTP/1.".startswith(data[:7]) else "garbage")
            return
        head = parse_head(data[:end])
        if head.fault is not None or self.send_no == _IDLE:
            self.drop(head.fault or "unasked")
            return
        stop = end + 4 + head.length
        if head.status < 200:
            self._rest = b""
            self.data_received(data[stop:])
            return
        if len(data) < stop:
            self._keep(data, None)
            return
        self._rest = b""
        send_no, self.send_no = self.send_no, _IDLE
        if head.close or len(data) > stop:
            self.closing = True
            self._transport.close()  # type: ignore[union-attr]  # data came, so it is connected
        deduplicated = b'"deduplicated":true' in data or b'"deduplicated": true' in data
        self.owner.answered(self, send_no, head, deduplicated)

    def _keep(self, data: bytes, fault: str | None) -> None:
        """Wait for the rest of an answer, within a bound."""
        if len(data) > 2 * _ANSWER_BYTES:
            fault = "too_long"
        if fault is None:
            self._rest = data
        else:
            self.drop(fault)


class _Tally:
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

    def add(self, other: _Tally) -> None:
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


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Sleeps until an instant of the monotonic clock.

    uvloop's timers round to whole milliseconds, up or down: up to half a millisecond of the generator's own
    in every latency. A timerfd in the event loop wakes within 0.1 ms (measured: median 0.045, p99 0.08).
    """

    def __init__(self) -> None:
        """Open the timer; without timerfd (not Linux) the loop's own timer serves."""
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        try:
            self._libc = ctypes.CDLL(None, use_errno=True)
            # CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC
            self._fd: int = self._libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, AttributeError):
            self._fd = -1
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ring)

    async def until(self, at_s: float) -> None:
        """Sleep until `time.monotonic()` is `at_s`."""
        if self._fd < 0:
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            return
        fraction, whole = math.modf(at_s)
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(int(whole), int(fraction * 1e9)))
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
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


@contextlib.asynccontextmanager
async def _measured_run() -> AsyncIterator[Alarm]:
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


def _bucket_start_us() -> int:
    """The first instant of the current bucket, µs since 1970: what schedules count from."""
    now_us = time.time_ns() // 1000
    return now_us - now_us % BUCKET_US


class _Sender:
    """What the three ways to send share: log, tally, connections, tasks, and the hunt for late answers."""

    def __init__(self, to: Target, timeout_s: float) -> None:
        self._to = to
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.log = SendLog()
        self.tally = _Tally()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run something until `close`."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, owner: Owner, lane: int) -> str | None:
        """Open a connection for the owner; the reason if it could not be."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._loop.create_connection(
                    lambda: Connection(owner, lane), self._to.host, self._to.port
                )
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


# ── open loop ────────────────────────────────────────────────────────────────────────────────────────────


class _Lane:
    """The connections of one device (or of those that share), and the sends that wait for one."""

    __slots__ = ("connecting", "idle", "open", "waiting")

    def __init__(self) -> None:
        self.idle: list[Connection] = []
        self.open = 0
        self.connecting = 0
        self.waiting: deque[int] = deque()


class OpenLoop(_Sender):
    """Sends a schedule at its times; a device that still waits for an answer takes a spare connection."""

    def __init__(
        self,
        to: Target,
        fleet: Sequence[Device],
        plan: Schedule,
        *,
        connections: int | None,
        timeout_s: float,
        alarm: Alarm,
    ) -> None:
        """Prepare; a number of `connections` is shared by the devices, None gives each its own and spares."""
        super().__init__(to, timeout_s)
        self._fleet = fleet
        self._heads = [to.head(device) for device in fleet]
        self._plan = plan
        self._alarm = alarm
        files = raise_open_files() - 128
        self._lanes = [_Lane() for _ in range(max(1, min(connections or len(fleet), len(fleet), files)))]
        spares = max(1, min(_PER_LANE, files // len(self._lanes)))
        self._per_lane = spares if connections is None else 1
        # sends without an answer so far, oldest first; None while one waits for a connection
        self._inflight: dict[int, Connection | None] = {}
        self._settled = asyncio.Event()
        self._dispatched = False
        self._start_s = 0.0
        self._base_us = 0
        self.late_us = array("q")

    # the owner's side: what connections report

    def connected(self, conn: Connection) -> None:
        """Use a new connection."""
        lane = self._lanes[conn.lane]
        lane.connecting -= 1
        lane.open += 1
        self._made(conn)
        self._free(conn, lane)

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """Settle a send and use the connection for the next."""
        now = time.monotonic()
        if self._inflight.pop(send_no, self) is not self:
            outcome = self.tally.outcome(head, deduplicated)
            self.log.outcome[send_no] = outcome
            if outcome is not Outcome.REFUSED:
                intended_s = self._start_s + self._plan.offset_us[send_no] / MICROS
                self.log.latency_s[send_no] = now - intended_s
            self._check_settled()
        if not conn.closing:
            self._free(conn, self._lanes[conn.lane])

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """Count the send that was on it as failed, and replace the connection if sends wait."""
        lane = self._lanes[conn.lane]
        lane.open -= 1
        self._connections.discard(conn)
        if conn in lane.idle:
            lane.idle.remove(conn)
        if send_no != _IDLE:
            self._fail(send_no, reason)
        if lane.waiting:
            self._open(conn.lane)

    # sending

    async def preconnect(self) -> None:
        """Open every lane's connection before the start; what fails is tried again by the first send."""
        slots = asyncio.Semaphore(_CONNECTING_AT_ONCE)

        async def one(lane_no: int) -> None:
            async with slots:
                self._lanes[lane_no].connecting += 1
                await self._connect(lane_no)

        await asyncio.gather(*(one(lane_no) for lane_no in range(len(self._lanes))))

    async def run(self, start_s: float, base_us: int) -> None:
        """Send all from `start_s` (monotonic) on, timestamps from `base_us`, and wait for the answers."""
        self._start_s, self._base_us = start_s, base_us
        self._spawn(self._sweep())
        await self._dispatch_all()
        self._dispatched = True
        self._check_settled()
        # every send is settled by its answer, its loss or the sweeper: the bound is for a bug here
        await asyncio.wait_for(self._settled.wait(), self._timeout_s * 1.1 + 5)

    async def _dispatch_all(self) -> None:
        offsets, count, at = self._plan.offset_us, len(self._plan), 0
        while at < count:
            due_us = int((time.monotonic() - self._start_s) * MICROS)
            burst_end = min(count, at + _BURST)
            while at < burst_end and offsets[at] <= due_us:
                self._dispatch(at, due_us)
                at += 1
            if at == count:
                break
            if offsets[at] <= due_us:
                await asyncio.sleep(0)
            else:
                await self._alarm.until(self._start_s + offsets[at] / MICROS)

    def _dispatch(self, send_no: int, now_us: int) -> None:
        """Send on an idle connection, or wait for one that is being opened."""
        device = self._plan.device[send_no]
        offset_us = self._plan.offset_us[send_no]
        self.log.add(device, self._fleet[device].made_us(self._base_us + offset_us))
        self.late_us.append(now_us - offset_us)
        self.tally.sent += 1
        self._inflight[send_no] = None
        lane_no = device % len(self._lanes)
        lane = self._lanes[lane_no]
        if lane.idle:
            self._write(lane.idle.pop(), send_no)
            return
        lane.waiting.append(send_no)
        if lane.open + lane.connecting < self._per_lane:
            self._open(lane_no)

    def _write(self, conn: Connection, send_no: int) -> None:
        device = self.log.device[send_no]
        body = body_us(self._fleet[device], self.log.ts_us[send_no], self._plan.beat_no[send_no])
        self._inflight[send_no] = conn
        conn.send(send_no, b"%b%d\r\n\r\n%b" % (self._heads[device], len(body), body))

    def _free(self, conn: Connection, lane: _Lane) -> None:
        """Give a free connection to the first send that still waits, or keep it."""
        while lane.waiting:
            send_no = lane.waiting.popleft()
            if send_no in self._inflight:
                self._write(conn, send_no)
                return
        lane.idle.append(conn)

    def _open(self, lane_no: int) -> None:
        self._lanes[lane_no].connecting += 1
        self._spawn(self._connect(lane_no))

    async def _connect(self, lane_no: int) -> None:
        """Open a connection; a failure is the failure of the send that has waited longest."""
        lane = self._lanes[lane_no]
        reason = await self._connection(self, lane_no)
        if reason is None:
            return
        lane.connecting -= 1
        if lane.waiting:
            self._fail(lane.waiting.popleft(), reason)
        if lane.waiting and lane.open + lane.connecting == 0:
            self._open(lane_no)

    # settling

    def _fail(self, send_no: int, reason: str) -> None:
        if self._inflight.pop(send_no, self) is self:
            return
        self.log.outcome[send_no] = Outcome.FAILED
        self.tally.failures[reason] += 1
        self._check_settled()

    def _check_settled(self) -> None:
        if self._dispatched and not self._inflight:
            self._settled.set()

    def _expire(self, asked_before_s: float) -> None:
        """Fail what was due before the instant; sends in flight lie in order of time."""
        horizon_us = int((asked_before_s - self._start_s) * MICROS)
        offset_us = self._plan.offset_us
        for send_no in list(itertools.takewhile(lambda no: offset_us[no] <= horizon_us, self._inflight)):
            conn = self._inflight[send_no]
            self._fail(send_no, "timeout")
            if conn is not None:
                conn.drop("timeout")


async def open_loop(
    to: Target,
    fleet: Sequence[Device],
    plan: Schedule,
    *,
    connections: int | None = None,
    timeout_s: float = TIMEOUT_S,
    preconnect: bool = True,
    settle_s: float = 0.5,
    pid: int | None = None,
    seed: int = 0,
) -> LoadRun:
    """Send a schedule in open loop, and its replayed queues beside it as agents do.

    Latencies count from the intended send times and cover the scheduled sends only. `connections` shares that
    many among the devices (default: one each, and up to three spares while it waits for an answer); they are
    opened beforehand, `settle_s` before the start. `pid` is the server's, for its CPU time.
    """
    async with _measured_run() as alarm:
        loop = OpenLoop(to, fleet, plan, connections=connections, timeout_s=timeout_s, alarm=alarm)
        if preconnect:
            await loop.preconnect()
            # the kernel shakes hands before the server accepts: thousands still lie in its backlog
            await asyncio.sleep(settle_s)
        base_us, before = _bucket_start_us(), cost_now(pid)
        start_s = time.monotonic()
        agents = Agents(to, fleet, timeout_s=timeout_s, seed=seed)
        drain = asyncio.create_task(
            agents.run(_arrivals(plan.replays), start_s, base_us, bound_s=plan.duration_s + timeout_s)
        )
        try:
            await loop.run(start_s, base_us)
            await drain
            elapsed_s, cost = time.monotonic() - start_s, cost_now(pid).since(before)
        finally:
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await agents.close()
            await loop.close()
    extra: dict[str, float | int | None] = {"expected_rows": plan.distinct_buckets()}
    if plan.replays:
        extra |= {f"replay_{key}": value for key, value in agents.figures().items()}
    spread = percentiles(loop.log.latencies())
    loop.tally.add(agents.tally)
    loop.log.extend(agents.log)
    result = _result(
        "open loop",
        len(fleet),
        plan.duration_s,
        tally=loop.tally,
        spread=spread,
        cost=cost,
        rate_per_s=loop.tally.ok / max(elapsed_s, plan.duration_s),
        late_us=loop.late_us,
        extra=extra,
    )
    return LoadRun(result, loop.log)


def _result(
    mode: str,
    devices: int,
    duration_s: float,
    *,
    tally: _Tally,
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
        extra=extra or {},
    )


# ── agents ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long an agent waits after a refusal or a failure: base · 2^n up to the cap, plus jitter on top."""

    base_s: float = 2.0
    cap_s: float = 300.0
    jitter: float = 0.25

    def delay_s(self, attempt: int, retry_after_s: float, rng: random.Random) -> float:
        """Seconds to wait after the `attempt`-th failure in a row (from 0); longer if the server said so."""
        # 2^20 is past every cap, and a float that grows without end overflows
        own = min(self.cap_s, self.base_s * 2.0 ** min(attempt, 20))
        return max(own * (1 + rng.random() * self.jitter), retry_after_s)


AGENT_BACKOFF: Final = Backoff()
# the agent's own bound: beyond it the oldest are given up
AGENT_QUEUE: Final = 500


class Arrival(NamedTuple):
    """Heartbeats that a device has to send from `at_us` on; all in µs from the start."""

    at_us: int
    device: int
    made_us: tuple[int, ...]


def _arrivals(queues: Sequence[Replay], plan: Schedule | None = None) -> list[Arrival]:
    """Queues of returning devices and the beats of a schedule, in order of time."""
    found = [Arrival(queue.start_us, queue.device, queue.made_us) for queue in queues]
    if plan is not None:
        found.extend(
            Arrival(at_us, device, (at_us,))
            for at_us, device in zip(plan.offset_us, plan.device, strict=True)
        )
    return sorted(found)


class _Agent:
    """One device's queue (numbers in the log, oldest first) and where it stands with the first of them."""

    __slots__ = ("attempt", "busy", "conn", "head", "queue", "timer")

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.queue: deque[int] = deque()
        self.attempt = 0
        self.busy = False
        self.conn: Connection | None = None
        self.timer: asyncio.TimerHandle | None = None


class Agents(_Sender):
    """Devices that keep each heartbeat until a 2xx, send one at a time, oldest first, and back off."""

    def __init__(
        self,
        to: Target,
        fleet: Sequence[Device],
        *,
        timeout_s: float = TIMEOUT_S,
        backoff: Backoff = AGENT_BACKOFF,
        ack_file: TextIO | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare; `ack_file` gets a line `device_id,ts_us` per acknowledged heartbeat."""
        super().__init__(to, timeout_s)
        self._fleet = fleet
        self._backoff = backoff
        self._ack_file = ack_file
        self._rng = random.Random(f"nexhb agents:{seed}")
        self._agents: dict[int, _Agent] = {}
        # devices whose answer is awaited → when it was asked, in order of time
        self._asked_s: dict[int, float] = {}
        self._first_s = array("d")
        self._left = 0
        self._arrived = False
        self._stopped = False
        self._drained = asyncio.Event()
        self._drained_s = math.nan
        self._dropped = 0
        self._start_s = 0.0
        self.late_us = array("q")

    async def run(self, arrivals: Sequence[Arrival], start_s: float, base_us: int, *, bound_s: float) -> None:
        """Send what arrives until all of it is acknowledged, or `bound_s` after the start."""
        self._start_s = start_s
        alarm = Alarm()
        self._spawn(self._arrive(arrivals, base_us, alarm))
        self._spawn(self._sweep())
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), max(0.0, start_s + bound_s - time.monotonic()))
        finally:
            self._stop()
            alarm.close()

    def figures(self) -> dict[str, float | int | None]:
        """Heartbeats, what became of them, and how long they took from the first attempt to the 2xx."""
        spread = percentiles(self.log.latencies())
        return {
            "heartbeats": len(self.log),
            "acked": self.log.count(Outcome.WRITTEN) + self.log.count(Outcome.DEDUPLICATED),
            "left": self._left,
            "dropped": self._dropped,
            "retries": self.tally.refused + self.tally.failed,
            "drained_s": None if math.isnan(self._drained_s) else round(self._drained_s, 3),
            "p50_ms": spread.p50_ms,
            "p99_ms": spread.p99_ms,
            "max_ms": spread.max_ms,
        }

    # the owner's side: what connections report

    def connected(self, conn: Connection) -> None:
        """Send the oldest on the new connection."""
        agent = self._agents[conn.lane]
        self._made(conn)
        agent.conn = conn
        if self._stopped or not agent.queue:
            conn.drop("done")
        else:
            self._write(conn.lane, agent, conn)

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """Forget an acknowledged heartbeat and send the next; keep a refused one."""
        device, agent = conn.lane, self._agents[conn.lane]
        self._asked_s.pop(device, None)
        agent.busy = False
        if conn.closing:
            agent.conn = None
        outcome = self.tally.outcome(head, deduplicated)
        if outcome is Outcome.REFUSED:
            self.log.outcome[send_no] = outcome
            self._back_off(device, agent, head.retry_after_s)
            return
        self._acknowledge(device, agent, outcome)
        self._kick(device, agent)

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """Keep what was on it for another attempt."""
        device, agent = conn.lane, self._agents[conn.lane]
        self._connections.discard(conn)
        if agent.conn is conn:
            agent.conn = None
        if send_no != _IDLE and not self._stopped:
            self._failed(device, agent, reason)

    # sending

    async def _arrive(self, arrivals: Sequence[Arrival], base_us: int, alarm: Alarm) -> None:
        for arrival in arrivals:
            at_s = self._start_s + arrival.at_us / MICROS
            if at_s > time.monotonic():
                await alarm.until(at_s)
            self.late_us.append(int((time.monotonic() - at_s) * MICROS))
            agent = self._agents.get(arrival.device)
            if agent is None:
                agent = self._agents[arrival.device] = _Agent(self._to.head(self._fleet[arrival.device]))
            for made_us in arrival.made_us:
                ts_us = self._fleet[arrival.device].made_us(base_us + made_us)
                agent.queue.append(self.log.add(arrival.device, ts_us))
                self._first_s.append(math.nan)
                self._left += 1
            self._give_up_oldest(agent)
            self._kick(arrival.device, agent)
        self._arrived = True
        self._check_drained()

    def _give_up_oldest(self, agent: _Agent) -> None:
        """Hold the queue to the agent's bound; the one that is being sent stays."""
        while len(agent.queue) > AGENT_QUEUE:
            del agent.queue[1 if agent.busy else 0]
            self._dropped += 1
            self._left -= 1

    def _kick(self, device: int, agent: _Agent) -> None:
        """Begin the next attempt, unless one is under way or waits for its time."""
        if agent.busy or agent.timer is not None or not agent.queue or self._stopped:
            return
        agent.busy = True
        self.tally.sent += 1
        first = agent.queue[0]
        if math.isnan(self._first_s[first]):
            self._first_s[first] = time.monotonic()
        if agent.conn is not None:
            self._write(device, agent, agent.conn)
            return
        self._spawn(self._connect(device, agent))

    def _write(self, device: int, agent: _Agent, conn: Connection) -> None:
        send_no = agent.queue[0]
        ts_us = self.log.ts_us[send_no]
        # the beat's number comes from its timestamp: a retry carries the same bytes, as the agent's does
        body = body_us(self._fleet[device], ts_us, ts_us // (60 * MICROS))
        self._asked_s[device] = time.monotonic()
        conn.send(send_no, b"%b%d\r\n\r\n%b" % (agent.head, len(body), body))

    async def _connect(self, device: int, agent: _Agent) -> None:
        reason = await self._connection(self, device)
        if reason is not None and not self._stopped:
            self._failed(device, agent, reason)

    # settling

    def _acknowledge(self, device: int, agent: _Agent, outcome: Outcome) -> None:
        send_no = agent.queue.popleft()
        agent.attempt = 0
        self.log.outcome[send_no] = outcome
        self.log.latency_s[send_no] = time.monotonic() - self._first_s[send_no]
        if self._ack_file is not None:
            self._ack_file.write(f"{self._fleet[device].device_id},{self.log.ts_us[send_no]}\n")
        self._left -= 1
        self._check_drained()

    def _failed(self, device: int, agent: _Agent, reason: str) -> None:
        self._asked_s.pop(device, None)
        agent.busy = False
        self.tally.failures[reason] += 1
        self.log.outcome[agent.queue[0]] = Outcome.FAILED
        self._back_off(device, agent, 0.0)

    def _back_off(self, device: int, agent: _Agent, retry_after_s: float) -> None:
        delay_s = self._backoff.delay_s(agent.attempt, retry_after_s, self._rng)
        agent.attempt += 1
        agent.timer = self._loop.call_later(delay_s, self._retry, device, agent)

    def _retry(self, device: int, agent: _Agent) -> None:
        agent.timer = None
        self._kick(device, agent)

    def _check_drained(self) -> None:
        if self._arrived and self._left == 0:
            self._drained_s = time.monotonic() - self._start_s
            self._drained.set()

    def _expire(self, asked_before_s: float) -> None:
        """Cut connections whose answer is overdue; `lost` then counts the failure."""
        for device in [device for device, asked_s in self._asked_s.items() if asked_s <= asked_before_s]:
            conn = self._agents[device].conn
            del self._asked_s[device]
            if conn is not None:
                conn.drop("timeout")

    def _stop(self) -> None:
        """Stop sending; attempts without an answer by now count as failed."""
        self._stopped = True
        for agent in self._agents.values():
            if agent.timer is not None:
                agent.timer.cancel()
            if agent.busy:
                self.tally.failures["bound"] += 1
                self.log.outcome[agent.queue[0]] = Outcome.FAILED


async def agents(
    to: Target,
    fleet: Sequence[Device],
    *,
    bound_s: float,
    queues: Sequence[Replay] = (),
    plan: Schedule | None = None,
    timeout_s: float = TIMEOUT_S,
    backoff: Backoff = AGENT_BACKOFF,
    ack_log: Path | None = None,
    pid: int | None = None,
    seed: int = 0,
) -> LoadRun:
    """Let agents send their queues and a schedule's beats until all is acknowledged, or `bound_s` has passed.

    Latencies count from a heartbeat's first attempt to its 2xx, waits between included. `ack_log` is appended
    to, a line at a time, so that it is whole even if this process is killed.
    """
    queues = (*queues, *(plan.replays if plan else ()))
    async with _measured_run():
        with contextlib.ExitStack() as files:
            ack_file = files.enter_context(ack_log.open("a", buffering=1)) if ack_log else None
            loop = Agents(to, fleet, timeout_s=timeout_s, backoff=backoff, ack_file=ack_file, seed=seed)
            base_us, before, start_s = _bucket_start_us(), cost_now(pid), time.monotonic()
            try:
                await loop.run(_arrivals(queues, plan), start_s, base_us, bound_s=bound_s)
                elapsed_s, cost = time.monotonic() - start_s, cost_now(pid).since(before)
            finally:
                await loop.close()
    result = _result(
        "agents",
        len(fleet),
        round(elapsed_s, 3),
        tally=loop.tally,
        spread=percentiles(loop.log.latencies()),
        cost=cost,
        rate_per_s=loop.tally.ok / elapsed_s,
        late_us=loop.late_us,
        extra=loop.figures(),
    )
    return LoadRun(result, loop.log)


# ── closed loop ──────────────────────────────────────────────────────────────────────────────────────────


class RequestPool:
    """Requests of distinct (device, bucket), oldest bucket first, spliced from parts made beforehand.

    A whole body costs 1.5 µs and a million of them a gigabyte; two joins around the timestamp cost 0.2 µs.
    The same devices at the same time give the same buckets: a second run on the same data wants another span.
    """

    _VARIANTS: Final = 4

    def __init__(self, to: Target, fleet: Sequence[Device], first_us: int, span_s: int) -> None:
        """Make the parts for the buckets from `first_us` (a bucket's start) over `span_s`."""
        self._first_s = first_us // MICROS
        self._devices = len(fleet)
        self._steps = span_s * MICROS // BUCKET_US
        self._fraction_us = array("q")
        self._before: list[bytes] = []
        self._after: list[bytes] = []
        for device in fleet:
            made_us = device.made_us(first_us + 1_001 * (1 + device.index % 900))
            self._fraction_us.append(made_us % MICROS)
            for variant in range(self._VARIANTS):
                body = body_us(device, made_us, variant)
                at = body.index(second_text(self._first_s))
                self._before.append(b"%b%d\r\n\r\n%b" % (to.head(device), len(body), body[:at]))
                self._after.append(body[at + len(second_text(self._first_s)) :])

    def __len__(self) -> int:
        """How many requests there are."""
        return self._devices * self._steps

    def request(self, number: int) -> tuple[int, int, bytes]:
        """Request `number`: its device, its timestamp (µs since 1970) and its bytes."""
        step, device = divmod(number, self._devices)
        # a device sends at its own second of the bucket
        second = self._first_s + step * 10 + device % 10
        part = device * self._VARIANTS + step % self._VARIANTS
        ts_us = second * MICROS + self._fraction_us[device]
        return device, ts_us, b"".join((self._before[part], second_text(second), self._after[part]))


class _Mark(NamedTuple):
    """Where a closed loop stood at an instant."""

    at_s: float
    ok: int
    sent: int
    cost: Cost


class ClosedLoop(_Sender):
    """Connections that each send the next request when the last was answered."""

    _REOPEN_S: Final = 0.05

    def __init__(self, to: Target, pool: RequestPool, *, timeout_s: float, pid: int | None) -> None:
        """Prepare."""
        super().__init__(to, timeout_s)
        self._pool = pool
        self._pid = pid
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
        if send_no != _IDLE:
            self.log.outcome[send_no] = Outcome.FAILED
            self.tally.failures[reason] += 1
        if self._running:
            self._spawn(self._connect(conn.lane, self._REOPEN_S if send_no != _IDLE else 0.0))
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
        return _Mark(time.monotonic(), self.tally.ok, self.tally.sent, cost_now(self._pid))

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
    span_days: int = 6,
    timeout_s: float = TIMEOUT_S,
    pid: int | None = None,
) -> LoadRun:
    """Send as fast as it goes over `connections` for `duration_s`, nothing to be deduplicated.

    Rate, latencies and CPU are those of the steady window: from `warm_s` to the end. Latencies count from the
    actual send, as a closed loop has no other: they say what a request costs, not what a fleet would wait.
    """
    warm_s = min(warm_s, duration_s / 2)
    first_us = _bucket_start_us() - span_days * 86_400 * MICROS
    pool = RequestPool(to, fleet, first_us, span_days * 86_400)
    async with _measured_run():
        loop = ClosedLoop(to, pool, timeout_s=timeout_s, pid=pid)
        try:
            warm, end = await loop.run(connections, warm_s, duration_s)
        finally:
            await loop.close()
    window_s, sends = end.at_s - warm.at_s, end.sent - warm.sent
    cost = end.cost.since(warm.cost)
    steady = [value for value in loop.log.latency_s[warm.sent :] if not math.isnan(value)]
    extra: dict[str, float | int | None] = {
        "connections": connections,
        "window_s": round(window_s, 3),
        "window_generator_cpu_share": round(cost.generator_s / window_s, 3),
        "window_server_cpu_share": None if cost.server_s is None else round(cost.server_s / window_s, 3),
    }
    result = _result(
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
