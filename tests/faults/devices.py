"""Simulated devices: each behaves as the agent does (docs/wire.md), with its minute scaled down to a tenth of a second.

A heartbeat is kept until a 2xx, at most 500 of them and none older than a day; the oldest goes first, after a failure
again after base · 2^n and up to 25 % more. Some do what agents do now and then: send what was acknowledged once more,
drain a queue as one list, lose their storage, hold a heartbeat back and send it behind newer ones.
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
from tests.faults.asking import Heard, Line
from tests.faults.beats import Beat, beat_at, body_of
from tests.faults.record import Record, What

BACKOFF = Backoff(base_s=0.05, cap_s=1.0)  # the agent: 2 s, 300 s
OLDEST_US = 24 * 3600 * MICROS
LIST_DEVICES = 8  # every so many-th drains its queue as lists
LIST_MOST = 40
REPEATED = 8


@dataclass(frozen=True)
class Habits:
    """How a fleet behaves."""

    every_s: float = 0.12  # between two heartbeats, a device's minute
    step_s: tuple[int, int] = (11, 45)  # what passes on the device's clock meanwhile; each beat has a bucket of its own
    back_h: tuple[int, int] = (20, 70)  # how far in the past a device's time begins: three days fill at once
    again: float = 0.03  # of what was acknowledged: sent once more
    forgotten: float = 0.02  # of what failed: the device's storage is gone
    held_back: float = 0.05  # sent behind newer ones


class Kiosk:
    """One device."""

    def __init__(self, fleet: Sequence[Device], number: int, record: Record, habits: Habits, seed: int) -> None:
        self.number = number
        self.waiting = 0  # requests without an answer
        self.acknowledged = 0
        self._fleet, self._record, self._habits = fleet, record, habits
        self._rng = random.Random(f"nexhb faults:{seed}:{number}")  # noqa: S311 - a simulation
        self._queue: deque[Beat] = deque()
        self._aside: list[Beat] = []
        self._deleted: deque[Beat] = deque(maxlen=REPEATED)
        self._clock = datetime.now(UTC) - timedelta(hours=self._rng.uniform(*habits.back_h))
        self._attempt = 0
        self._stopped = asyncio.Event()
        self._more = asyncio.Event()

    @property
    def held(self) -> int:
        """Heartbeats that it still has to send."""
        return len(self._queue) + len(self._aside)

    @property
    def is_empty(self) -> bool:
        """Whether all it made is settled."""
        return self._stopped.is_set() and not self.held and not self.waiting

    async def make(self) -> None:
        """Make heartbeats until stopped."""
        while not await self._told_to_stop(self._habits.every_s * (0.5 + self._rng.random())):
            self._clock += timedelta(seconds=self._rng.randint(*self._habits.step_s))
            beat = beat_at(self._fleet, self.number, self._clock)
            if self._rng.random() < self._habits.held_back:
                self._aside.append(beat)
                continue
            self._queue.append(beat)
            if self._aside and self._rng.random() < 0.1:
                self._queue.append(self._aside.pop(0))
            self._more.set()

    async def _told_to_stop(self, within_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._stopped.wait()
        return self._stopped.is_set()

    def stop_making(self) -> None:
        """No more; what was held back goes now, behind all that is newer."""
        self._stopped.set()
        self._queue.extend(self._aside)
        self._aside.clear()
        self._more.set()

    def repeat(self) -> None:
        """Send the last ones that were acknowledged once more: it died before it had deleted them."""
        self._queue.extendleft(beat for beat in reversed(self._deleted) if beat not in self._queue)
        self._deleted.clear()
        self._more.set()

    async def send(self, port: int) -> None:
        """Send what is queued, oldest first, until cancelled."""
        line = Line(self._fleet[self.number], port)
        try:
            while True:
                await self._give_up()
                if not self._queue:
                    self._more.clear()
                    await self._more.wait()
                    continue
                await self._send_oldest(line)
        finally:
            line.close()

    async def _give_up(self) -> None:
        """The agent's own bounds."""
        now_us = beat_at(self._fleet, self.number, self._clock).ts_us
        gone: list[Beat] = []
        while self._queue and (len(self._queue) > AGENT_QUEUE or now_us - self._queue[0].ts_us > OLDEST_US):
            gone.append(self._queue.popleft())
        if gone:
            await self._record.add(gone, What.GIVEN_UP)

    async def _send_oldest(self, line: Line) -> None:
        many = LIST_MOST if self.number % LIST_DEVICES == 0 and len(self._queue) > 3 else 1
        beats = [self._queue[place] for place in range(min(many, len(self._queue)))]
        heard = await self._ask(line, beats)
        if heard.what is What.ACKNOWLEDGED:
            self._deleted.extend(beats)
            self._delete(beats)
            self._attempt = 0
            self.acknowledged += len(beats)
            if self._rng.random() < self._habits.again:
                await self._ask(line, beats)  # it died before it had deleted them
            return
        if self._rng.random() < self._habits.forgotten:
            self._delete(beats)
            await self._record.add(beats, What.GIVEN_UP)
        await asyncio.sleep(BACKOFF.delay_s(self._attempt, 0.0, self._rng))
        self._attempt += 1

    def _delete(self, beats: list[Beat]) -> None:
        for beat in beats:  # another may be the oldest meanwhile
            self._queue.remove(beat)

    async def _ask(self, line: Line, beats: list[Beat]) -> Heard:
        """One request, written down before and after."""
        await self._record.add(beats, What.SENT)
        self.waiting += 1
        try:
            heard = await line.ask([body_of(self._fleet, beat) for beat in beats])
        finally:
            self.waiting -= 1
        what = What.TURNED_AWAY if heard.refused else heard.what
        if what is What.ACKNOWLEDGED and heard.deduplicated == len(beats):
            what = What.DEDUPLICATED
        await self._record.add(beats, what, heard.said)
        return heard
