"""Simulated agents: each device keeps a heartbeat until it is acknowledged, sends the oldest first, and backs off."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.cost import cost_now
from bench.fleet import MICROS, Device, Replay, Schedule, body_us
from bench.load.connection import Connection, Response
from bench.load.requests import bucket_start_s
from bench.load.sender import TIMEOUT_S, LoadRun, Sender, Target
from bench.report import Outcome


@dataclass(frozen=True, slots=True)
class Backoff:
    """The wait of an agent after a refusal or a failure: base · 2^n up to the cap, plus jitter on top."""

    base_s: float = 2.0
    cap_s: float = 300.0
    jitter: float = 0.25

    def delay_s(self, attempt: int, retry_after_s: float, rng: random.Random) -> float:
        """Return the seconds to wait after the `attempt`-th failure in a row (from 0), at least `retry_after_s`."""
        # 2^20 exceeds every cap; without a bound the float would overflow
        own = min(self.cap_s, self.base_s * 2.0 ** min(attempt, 20))
        return max(own * (1 + rng.random() * self.jitter), retry_after_s)


AGENT_BACKOFF: Final = Backoff()
# the length of the real agent's queue; if the queue is full, the agent drops the oldest heartbeats
AGENT_QUEUE: Final = 500
# some heartbeats of a device: the time from which the device sends them, and the times at which it made them, in µs
# from the start
Arrival = tuple[int, Sequence[int]]


class Agents(Sender):
    """Devices that keep each heartbeat until it gets a 2xx, send one at a time, oldest first, and back off."""

    def __init__(self, to: Target, timeout_s: float, backoff: Backoff) -> None:
        super().__init__(to, timeout_s)
        self._backoff = backoff
        self._rng = random.Random("nexhb agents")
        self._base_us = bucket_start_s() * MICROS
        self.dropped = 0
        self.longest_wait_s = 0.0

    async def send(self, index: int, device: Device, arrivals: Sequence[Arrival]) -> None:
        """Send the heartbeats of a device until all are acknowledged. The log has an entry for each heartbeat; a
        heartbeat counts as due at its first attempt."""
        queue: deque[int] = deque()
        conn: Connection | str | None = None
        attempt = arrived = 0
        while queue or arrived < len(arrivals):
            now_us = int((time.monotonic() - self._start_s) * MICROS)
            while arrived < len(arrivals) and arrivals[arrived][0] <= now_us:
                for made_us in arrivals[arrived][1]:
                    queue.append(self.log.add(index, device.made_us(self._base_us + made_us)))
                arrived += 1
            while len(queue) > AGENT_QUEUE:
                queue.popleft()
                self.dropped += 1
            if not queue:
                await asyncio.sleep((arrivals[arrived][0] - now_us) / MICROS)
                continue
            send_no = queue[0]
            self.log.due_us[send_no] = self.log.due_us[send_no] or max(1, now_us)
            if not isinstance(conn, Connection) or conn.closing:
                conn = await self._connect()
            if isinstance(conn, str):
                response = Response(0, failure=conn)
            else:
                response = await self._ask(conn, device, send_no)
            if self._record(send_no, response) < Outcome.REFUSED:
                queue.popleft()
                attempt = 0
            else:
                await asyncio.sleep(self._backoff.delay_s(attempt, response.retry_after_s, self._rng))
                attempt += 1

    async def _ask(self, conn: Connection, device: Device, send_no: int) -> Response:
        ts_us, began_s = self.log.ts_us[send_no], time.monotonic()
        # the heartbeat's number is derived from its timestamp, so that a retry sends the same bytes
        body = body_us(device, ts_us, ts_us // (60 * MICROS))
        try:
            response = await conn.request(b"%b%d\r\n\r\n%b" % (self._to.head(device.token), len(body), body))
        except asyncio.CancelledError:
            # the time limit of the run: an attempt that has no response yet counts as failed
            self._record(send_no, Response(0, failure="bound"))
            raise
        if response.status:
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began_s)
        return response

    def _record(self, send_no: int, response: Response) -> Outcome:
        self.sent += 1
        outcome = self.log.outcome[send_no] = self._count(response)
        if outcome < Outcome.REFUSED:
            due_s = self._start_s + self.log.due_us[send_no] / MICROS
            self.log.latency_s[send_no] = time.monotonic() - due_s
        return outcome


async def agents(
    to: Target,
    fleet: Sequence[Device],
    *,
    bound_s: float,
    queues: Sequence[Replay] = (),
    plan: Schedule | None = None,
    timeout_s: float = TIMEOUT_S,
    backoff: Backoff = AGENT_BACKOFF,
    pids: Sequence[int] = (),
) -> LoadRun:
    """Let agents send their queues and a schedule's heartbeats until all are acknowledged, or `bound_s` has passed.

    A heartbeat's latency counts from its first attempt to the 2xx, waits in between included. The result counts
    requests, not heartbeats.
    """
    arrivals: dict[int, list[Arrival]] = {queue.device: [(queue.start_us, queue.made_us)] for queue in queues}
    if plan is not None:
        for at_us, index in zip(plan.offset_us, plan.device, strict=True):
            arrivals.setdefault(index, []).append((at_us, (at_us,)))
    async with Agents(to, timeout_s, backoff) as loop:
        before, began_at_s = cost_now(pids), time.time()
        sending = [asyncio.create_task(loop.send(index, fleet[index], each)) for index, each in arrivals.items()]
        try:
            _, unfinished = await asyncio.wait(sending, timeout=bound_s)
            cost = cost_now(pids).since(before)
        finally:
            for task in sending:
                task.cancel()
            ends = await asyncio.gather(*sending, return_exceptions=True)
    for failure in ends:
        if isinstance(failure, Exception):
            raise failure
    made = sum(len(queue.made_us) for queue in queues) + (0 if plan is None else len(plan))
    extra: dict[str, float | int | None] = {
        "left": made - loop.log.acknowledged - loop.dropped,
        "dropped": loop.dropped,
        "retries": loop.sent - loop.ok,
        "drained_s": None if unfinished else round(cost.at_s, 3),
        "longest_wait_s": round(loop.longest_wait_s, 3),
    }
    return LoadRun(loop.result("agents", len(fleet), cost.at_s, cost, loop.log, extra), loop.log, began_at_s)
