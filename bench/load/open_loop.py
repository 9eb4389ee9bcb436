"""Open loop: every send at its intended time, whatever became of the earlier ones; latency counts from it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final

from bench.cost import cost_now
from bench.fleet import MICROS, Device, Schedule, body_us
from bench.load.agents import Agents, arrivals_of
from bench.load.alarm import Alarm
from bench.load.connection import IDLE, Connection, Head
from bench.load.sender import TIMEOUT_S, LoadRun, Progress, Sender, bucket_start_us, make_result, measured_run
from bench.load.target import Target, raise_open_files
from bench.report import Outcome, percentiles

# connections a device may have at once: its own, and spares while that one waits for an answer
_PER_LANE: Final = 4
_CONNECTING_AT_ONCE: Final = 64
# stands for a send that is none: the first request of a connection that is opened beforehand
_GREETING: Final = -2
# sends between two looks at the sockets, when the generator has fallen behind
_BURST: Final = 64


class _Lane:
    """The connections of one device (or of those that share), and the sends that wait for one."""

    __slots__ = ("connecting", "idle", "open", "waiting")

    def __init__(self) -> None:
        self.idle: list[Connection] = []
        self.open = 0
        self.connecting = 0
        self.waiting: deque[int] = deque()


class OpenLoop(Sender):
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
        until: asyncio.Event | None,
    ) -> None:
        """Prepare; a number of `connections` is shared by the devices, None gives each its own and spares."""
        super().__init__(to, timeout_s)
        self._fleet = fleet
        self._heads = [to.head(device) for device in fleet]
        self._plan = plan
        self._alarm = alarm
        self._until = until
        files = raise_open_files() - 128
        self._lanes = [_Lane() for _ in range(max(1, min(connections or len(fleet), len(fleet), files)))]
        spares = max(1, min(_PER_LANE, files // len(self._lanes)))
        self._per_lane = spares if connections is None else 1
        # sends without an answer so far, oldest first; None while one waits for a connection
        self._inflight: dict[int, Connection | None] = {}
        self._settled = asyncio.Event()
        # while connections are opened beforehand: how many greetings have no answer yet
        self._opening = False
        self._greetings = 0
        self._all_greeted = asyncio.Event()
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
        if not self._opening:
            self._free(conn, lane)
            return
        self._greetings += 1
        self._all_greeted.clear()
        conn.send(_GREETING, self._to.greeting())

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """Settle a send and use the connection for the next."""
        now = time.monotonic()
        self._greeted(send_no)
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
        self._greeted(send_no)
        self._connections.discard(conn)
        if conn in lane.idle:
            lane.idle.remove(conn)
        if send_no != IDLE:
            self._fail(send_no, reason)
        if lane.waiting:
            self._open(conn.lane)

    # sending

    async def preconnect(self) -> None:
        """Open every lane's connection before the start; what fails is tried again by the first send.

        Each asks for something at once: a server may cut a connection on which nothing comes for a while, and some
        devices' first send is a minute away.
        """
        slots = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        self._opening = True

        async def one(lane_no: int) -> None:
            async with slots:
                self._lanes[lane_no].connecting += 1
                await self._connect(lane_no)

        await asyncio.gather(*(one(lane_no) for lane_no in range(len(self._lanes))))
        self._opening = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s if self._greetings else 0):
                await self._all_greeted.wait()

    def _greeted(self, send_no: int) -> None:
        if send_no == _GREETING:
            self._greetings -= 1
            if self._greetings == 0:
                self._all_greeted.set()

    async def run(self, start_s: float, base_us: int, progress: Progress | None) -> None:
        """Send all from `start_s` (monotonic) on, timestamps from `base_us`, and wait for the answers."""
        self._start_s, self._base_us = start_s, base_us
        self._spawn(self._sweep())
        if progress is not None:
            self._spawn(self._tell(progress))
        await self._dispatch_all()
        self._dispatched = True
        self._check_settled()
        # every send is settled by its answer, its loss or the sweeper: the bound is for a bug here
        await asyncio.wait_for(self._settled.wait(), self._timeout_s * 1.1 + 5)

    async def _dispatch_all(self) -> None:
        offsets, count, at = self._plan.offset_us, len(self._plan), 0
        while at < count and not (self._until and self._until.is_set()):
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
    progress: Progress | None = None,
    until: asyncio.Event | None = None,
) -> LoadRun:
    """Send a schedule in open loop, and its replayed queues beside it as agents do.

    Latencies count from the intended send times and cover the scheduled sends only. `connections` shares that
    many among the devices (default: one each, and up to three spares while it waits for an answer); they are
    opened beforehand, `settle_s` before the start. `pid` is the server's, for its CPU time. Once `until` is set nothing
    more is sent, and the run counts as one of what was sent by then.
    """
    async with measured_run() as alarm:
        loop = OpenLoop(to, fleet, plan, connections=connections, timeout_s=timeout_s, alarm=alarm, until=until)
        if preconnect:
            await loop.preconnect()
            # the kernel shakes hands before the server accepts: thousands still lie in its backlog
            await asyncio.sleep(settle_s)
        base_us, before = bucket_start_us(), cost_now(pid)
        start_s, began_at_s = time.monotonic(), time.time()
        agents = Agents(to, fleet, timeout_s=timeout_s, seed=seed)
        drain = asyncio.create_task(
            agents.run(arrivals_of(plan.replays), start_s, base_us, bound_s=plan.duration_s + timeout_s)
        )
        try:
            await loop.run(start_s, base_us, progress)
            await drain
            elapsed_s, cost = time.monotonic() - start_s, cost_now(pid).since(before)
        finally:
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await agents.close()
            await loop.close()
    if len(loop.log) < len(plan):
        plan = plan.head(len(loop.log), elapsed_s)
    extra: dict[str, float | int | None] = {"expected_rows": plan.distinct_buckets()}
    if plan.replays:
        extra |= {f"replay_{key}": value for key, value in agents.figures().items()}
    spread = percentiles(loop.log.latencies())
    loop.tally.add(agents.tally)
    loop.log.extend(agents.log)
    result = make_result(
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
    return LoadRun(result, loop.log, began_at_s)
