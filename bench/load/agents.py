"""Agents: each device keeps a heartbeat until it is acknowledged, oldest first, and backs off in between."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TextIO

from bench.cost import cost_now
from bench.fleet import MICROS, Device, Replay, Schedule, body_us
from bench.load.alarm import Alarm
from bench.load.connection import IDLE, Connection, Head
from bench.load.sender import TIMEOUT_S, LoadRun, Progress, Sender, bucket_start_us, make_result, measured_run
from bench.load.target import Target
from bench.report import Outcome, percentiles


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


# told of each answer: the heartbeat's number in the log, the HTTP status, the seconds that it was waited for
Heard = Callable[[int, int, float], None]

AGENT_BACKOFF: Final = Backoff()
# the agent's own bound: beyond it the oldest are given up
AGENT_QUEUE: Final = 500


class Arrival(NamedTuple):
    """Heartbeats that a device has to send from `at_us` on; all in µs from the start."""

    at_us: int
    device: int
    made_us: tuple[int, ...]


def arrivals_of(queues: Sequence[Replay], plan: Schedule | None = None) -> list[Arrival]:
    """Queues of returning devices and the beats of a schedule, in order of time."""
    found = [Arrival(queue.start_us, queue.device, queue.made_us) for queue in queues]
    if plan is not None:
        found.extend(
            Arrival(at_us, device, (at_us,)) for at_us, device in zip(plan.offset_us, plan.device, strict=True)
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


class Agents(Sender):
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
        heard: Heard | None = None,
    ) -> None:
        """Prepare; `ack_file` gets a line `device_id,ts_us` per acknowledged heartbeat."""
        super().__init__(to, timeout_s)
        self._fleet = fleet
        self._backoff = backoff
        self._ack_file = ack_file
        self._heard = heard
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

    async def run(
        self,
        arrivals: Sequence[Arrival],
        start_s: float,
        base_us: int,
        *,
        bound_s: float,
        progress: Progress | None = None,
    ) -> None:
        """Send what arrives until all of it is acknowledged, or `bound_s` after the start."""
        self._start_s = start_s
        alarm = Alarm()
        self._spawn(self._arrive(arrivals, base_us, alarm))
        self._spawn(self._sweep())
        if progress is not None:
            self._spawn(self._tell(progress))
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
        asked_s = self._asked_s.pop(device, math.nan)
        if self._heard is not None:
            self._heard(send_no, head.status, time.monotonic() - asked_s)
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
        if send_no != IDLE and not self._stopped:
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
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> LoadRun:
    """Let agents send their queues and a schedule's beats until all is acknowledged, or `bound_s` has passed.

    Latencies count from a heartbeat's first attempt to its 2xx, waits between included. `ack_log` is appended
    to, a line at a time, so that it is whole even if this process is killed.
    """
    queues = (*queues, *(plan.replays if plan else ()))
    async with measured_run():
        with contextlib.ExitStack() as files:
            ack_file = files.enter_context(ack_log.open("a", buffering=1)) if ack_log else None
            loop = Agents(to, fleet, timeout_s=timeout_s, backoff=backoff, ack_file=ack_file, seed=seed, heard=heard)
            base_us, before, start_s, began_at_s = bucket_start_us(), cost_now(pid), time.monotonic(), time.time()
            try:
                await loop.run(arrivals_of(queues, plan), start_s, base_us, bound_s=bound_s, progress=progress)
                elapsed_s, cost = time.monotonic() - start_s, cost_now(pid).since(before)
            finally:
                await loop.close()
    result = make_result(
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
    return LoadRun(result, loop.log, began_at_s)
