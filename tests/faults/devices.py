"""Simulated devices: each behaves as the agent does (docs/wire.md), with its minute scaled down to a tenth of a second.

A device keeps each heartbeat until it receives a 2xx; it keeps at most 500 of them, and none older than a day. It
sends the oldest first. After a failure it retries after base · 2^n plus up to 25 %. Some devices do what agents do now
and then: they send an acknowledged heartbeat once more, drain their queue as one list, lose their storage, or hold a
heartbeat back and send it after newer ones.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bench.fleet import MICROS, Device
from bench.load.agents import AGENT_QUEUE, Backoff
from tests.faults.device_client import DeviceConnection, RequestOutcome
from tests.faults.heartbeats import Heartbeat, body_of, heartbeat_at
from tests.faults.journal import Event, Journal

BACKOFF = Backoff(base_s=0.05, cap_s=1.0)  # the agent's values are 2 s and 300 s
OLDEST_US = 24 * 3600 * MICROS
LIST_DEVICES = 8  # every eighth device drains its queue as lists
MAX_LIST = 40
REPEATED = 8  # acknowledged heartbeats that a device can send again


@dataclass(frozen=True)
class Habits:
    """How the devices of a fleet behave."""

    every_s: float = 0.12  # between two heartbeats: the scaled-down minute
    # How far the device's clock advances from one heartbeat to the next: more than 10 s, so that no two heartbeats
    # share a bucket.
    step_s: tuple[int, int] = (11, 45)
    clock_behind_h: tuple[int, int] = (
        20,
        70,
    )  # how far in the past a device's clock starts, so that three days fill at once
    repeated: float = 0.03  # share of the acknowledged requests that are sent once more
    lost: float = 0.02  # share of the failed requests whose heartbeats the device loses with its storage
    held_back: float = 0.05  # share of the heartbeats that are sent after newer heartbeats


class Kiosk:
    """One simulated device."""

    def __init__(self, fleet: Sequence[Device], number: int, journal: Journal, habits: Habits, seed: int) -> None:
        self.number = number
        self.in_flight = 0  # requests that have no response yet
        self.acknowledged = 0
        self._fleet, self._journal, self._habits = fleet, journal, habits
        self._rng = random.Random(f"nexhb faults:{seed}:{number}")  # noqa: S311 - a simulation
        self._queue: deque[Heartbeat] = deque()
        self._held_back: list[Heartbeat] = []
        self._deleted: deque[Heartbeat] = deque(maxlen=REPEATED)
        self._clock = datetime.now(UTC) - timedelta(hours=self._rng.uniform(*habits.clock_behind_h))
        self._attempt = 0
        self._stopped = asyncio.Event()
        self._more = asyncio.Event()

    @property
    def unsent(self) -> int:
        """How many heartbeats the device still has to send."""
        return len(self._queue) + len(self._held_back)

    @property
    def is_empty(self) -> bool:
        """Whether the device makes no more heartbeats, and has no heartbeat that is unsent or in flight."""
        return self._stopped.is_set() and not self.unsent and not self.in_flight

    async def make(self) -> None:
        """Make heartbeats until stopped."""
        while not await self._is_stopped(self._habits.every_s * (0.5 + self._rng.random())):
            self._clock += timedelta(seconds=self._rng.randint(*self._habits.step_s))
            heartbeat = heartbeat_at(self._fleet, self.number, self._clock)
            if self._rng.random() < self._habits.held_back:
                self._held_back.append(heartbeat)
                continue
            self._queue.append(heartbeat)
            if self._held_back and self._rng.random() < 0.1:
                self._queue.append(self._held_back.pop(0))
            self._more.set()

    async def _is_stopped(self, within_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._stopped.wait()
        return self._stopped.is_set()

    def stop_making(self) -> None:
        """Make no more heartbeats, and queue those that were held back, after all newer ones."""
        self._stopped.set()
        self._queue.extend(self._held_back)
        self._held_back.clear()
        self._more.set()

    def repeat(self) -> None:
        """Send the last acknowledged heartbeats once more, as a device does that crashed before it had deleted them."""
        self._queue.extendleft(heartbeat for heartbeat in reversed(self._deleted) if heartbeat not in self._queue)
        self._deleted.clear()
        self._more.set()

    async def send(self, port: int) -> None:
        """Send the queued heartbeats, oldest first, until cancelled."""
        connection = DeviceConnection(self._fleet[self.number], port)
        try:
            while True:
                await self._discard_excess()
                if not self._queue:
                    self._more.clear()
                    await self._more.wait()
                    continue
                await self._send_oldest(connection)
        finally:
            connection.close()

    async def _discard_excess(self) -> None:
        """Discard the heartbeats that exceed the agent's own limits of number and age."""
        now_us = heartbeat_at(self._fleet, self.number, self._clock).ts_us
        discarded: list[Heartbeat] = []
        while self._queue and (len(self._queue) > AGENT_QUEUE or now_us - self._queue[0].ts_us > OLDEST_US):
            discarded.append(self._queue.popleft())
        if discarded:
            await self._journal.add(discarded, Event.DISCARDED)

    async def _send_oldest(self, connection: DeviceConnection) -> None:
        many = MAX_LIST if self.number % LIST_DEVICES == 0 and len(self._queue) > 3 else 1
        heartbeats = [self._queue[place] for place in range(min(many, len(self._queue)))]
        outcome = await self._request(connection, heartbeats)
        if outcome.event is Event.ACKNOWLEDGED:
            self._deleted.extend(heartbeats)
            self._delete(heartbeats)
            self._attempt = 0
            self.acknowledged += len(heartbeats)
            if self._rng.random() < self._habits.repeated:
                await self._request(connection, heartbeats)  # as after a crash of the device before it deleted them
            return
        if self._rng.random() < self._habits.lost:
            self._delete(heartbeats)
            await self._journal.add(heartbeats, Event.DISCARDED)
        await asyncio.sleep(BACKOFF.delay_s(self._attempt, 0.0, self._rng))
        self._attempt += 1

    def _delete(self, heartbeats: list[Heartbeat]) -> None:
        for heartbeat in heartbeats:  # they may no longer be at the beginning of the queue
            self._queue.remove(heartbeat)

    async def _request(self, connection: DeviceConnection, heartbeats: list[Heartbeat]) -> RequestOutcome:
        """Send one request, add entries to the journal before and after it, and return the outcome."""
        await self._journal.add(heartbeats, Event.SENT)
        self.in_flight += 1
        try:
            outcome = await connection.send([body_of(self._fleet, heartbeat) for heartbeat in heartbeats])
        finally:
            self.in_flight -= 1
        event = Event.REJECTED if outcome.rejected else outcome.event
        if event is Event.ACKNOWLEDGED and outcome.deduplicated == len(heartbeats):
            event = Event.DEDUPLICATED
        await self._journal.add(heartbeats, event, outcome.detail)
        return outcome
