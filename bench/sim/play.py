"""Feed a script to the real writer and the real watcher, on a real PostgreSQL, with the clock of the script.

A round of the watcher is due every ten seconds. Those in which nothing can change are left out (unless `every_round`):
a round follows each heartbeat that differs from the last one of its kiosk, each moment at which a kiosk may have become
silent, at which a silence or closed hours end, and each time at which the watcher wants to look again.

Heartbeats that say what their kiosk said before wait for the next round that judges silence, at most for LONGEST_BATCH.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from bench.sim import telling, uptime
from bench.sim.agent import Sent, sent_by
from bench.sim.script import CALM, CLONE, CLOSES, HOUR, OPENS, ROUTES, ZONE, Kiosk, Script
from bench.sim.telling import Voice
from nexhb import availability
from nexhb.config import WatchSettings
from nexhb.devices import sites
from nexhb.devices.troubles import Troubles
from nexhb.heartbeat import DeviceFacts, Heartbeat, Label, bucket_of
from nexhb.ingest import commit
from nexhb.ingest.connection import Session
from nexhb.ingest.intake import Intake
from nexhb.postgres.connections import Connection, Database, use_packed
from nexhb.readiness import Readiness
from nexhb.watching.causes import settles_after
from nexhb.watching.judging import Rules
from nexhb.watching.state import Thresholds
from nexhb.watching.watcher import Watcher
from tests.support.watching_truth import silent_at

TICK = 10.0
LONGEST_BATCH = 500.0  # seconds: a longer one would look like a silence
LONGEST_QUEUE = 5_000  # of items that were made ahead
SAMPLE_EVERY = 600.0
NEVER = math.inf
TOLD_AFTER = 125.0  # of an outage of ours: the daemon tells of it after two minutes
_FACTS = DeviceFacts(None, "13", 33, None, None, "SM-T500", "samsung")
_FACTS_OF_CLONE = _FACTS._replace(model="SM-T510")
_REMINDERS = [(route.name, timedelta(seconds=route.reminder)) for route in ROUTES if route.reminder]
_LABELS: dict[str, Label] = {}


class Want(NamedTuple):
    """A round must run at `at`: `reason` is silence, down (an outage of ours begins), told (routes are told of it), up
    (it ends), or moment (something in the script begins or ends)."""

    at: float
    reason: str


@dataclass
class Found:
    """What the watcher recorded."""

    events: list[Any] = field(default_factory=list)
    outages: list[Any] = field(default_factory=list)
    incidents: list[Any] = field(default_factory=list)
    offline: list[tuple[float, frozenset[int]]] = field(default_factory=list)  # at sampled moments
    messages: list[Any] = field(default_factory=list)  # the outbox
    received: list[Any] = field(default_factory=list)  # by the receiver
    days: uptime.Days = field(default_factory=dict)
    heartbeats: int = 0
    rounds: int = 0


async def play(script: Script, database: Database, *, every_round: bool = False) -> Found:
    """Simulate the whole script. Return what nexhb recorded in the database."""
    conn = await database.connect(application="sim watch", jit="off", synchronous_commit="off")
    writer = await database.connect(application="sim writer", jit="off", synchronous_commit="off")
    try:
        await use_packed(writer)
        await _create(conn, script)
        clock = _Clock(script)
        async with telling.speaking(database, clock) as voice:
            player = _Player(script, database, conn, Session(writer, _rules().noteworthy), every_round, clock, voice)
            await player.play()
            return await player.found()
    finally:
        conn.terminate()
        writer.terminate()


def _rules() -> Rules:
    watch = WatchSettings()
    return Rules(Thresholds(timedelta(seconds=600), watch.battery_low_pct, watch.battery_ok_pct))


async def _create(conn: Connection, script: Script) -> None:
    with_hours = {kiosk.site: kiosk.has_hours for kiosk in script.kiosks}
    for site, has_hours in sorted(with_hours.items()):
        hours = f"{OPENS:02d}:00-{CLOSES:02d}:00" if has_hours else None
        await sites.put(conn, sites.Site(site, zone=ZONE, hours=hours))
    await conn.executemany(
        "INSERT INTO devices (device_no, device_id, site, tags, created_at) OVERRIDING SYSTEM VALUE"
        " VALUES ($1, $2, $3, $4, $5)",
        [(kiosk.number, kiosk.id, kiosk.site, kiosk.tags, script.start) for kiosk in script.kiosks],
    )
    await conn.executemany(
        telling.ADD_SILENCE,
        [(each.scope, each.value, script.at(each.start), script.at(each.end)) for each in script.silences],
    )


@dataclass
class _Clock:
    """The clock of the script."""

    script: Script
    t: float = 0.0

    def __call__(self) -> datetime:
        return self.script.at(self.t)


Item = tuple[Sent | Want, bool, Heartbeat | None]


class _Ahead:
    """Makes what comes next while PostgreSQL works."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._made: deque[Item] = deque()
        self._is_over = False

    @property
    def _is_full(self) -> bool:
        return len(self._made) > LONGEST_QUEUE

    def items(self) -> Iterator[Item]:
        """Yield every item."""
        while self._made or self._make():
            yield self._made.popleft()
        self._is_over = True

    async def run(self) -> None:
        """Make items until there are no more."""
        while not self._is_over and (self._is_full or self._make()):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.002 if self._is_full else 0)

    def _make(self) -> bool:
        """Make a few items; a response of PostgreSQL waits meanwhile. Return whether there were any."""
        before = len(self._made)
        self._made.extend(islice(self._items, 20))
        return len(self._made) > before


@dataclass
class _Player:
    script: Script
    database: Database
    conn: Connection
    session: Session
    every_round: bool
    clock: _Clock
    voice: Voice

    def __post_init__(self) -> None:
        self.intake = Intake(Readiness(), max_items=100_000, max_bytes=1 << 30)
        self.watcher = Watcher(
            Database("not used"), _rules(), TICK, self.clock, monotonic=lambda: self.clock.t, tell=self.voice.teller
        )
        self.batch: list[tuple[Sent, Heartbeat]] = []
        self.odd: dict[int, float] = {}  # kiosk → when the odd heartbeat or post in the batch was received
        self.slow = {kiosk.number for kiosk in self.script.kiosks if kiosk.interval > 60}
        self.whole_at = 0.0  # when the next round is due that needs every heartbeat
        self.looked_at = self.script.start
        self.troubles = Troubles(self.database, lambda: self.looked_at, 10)
        self.renewed_at, self.sampled_at = 0.0, 0.0
        self.is_down = False
        self.result = Found()

    async def play(self) -> None:
        await availability.renew(self.conn, self.script.at(0))
        due = TICK
        ours = sorted(
            Want(at, reason)
            for down, up in self.script.ours
            for at, reason in ((down, "down"), (down + TOLD_AFTER, "told"), (up, "up"))
        )
        streams = [_with_wants(kiosk, self.script, self.every_round) for kiosk in self.script.kiosks]
        wants = sorted([*ours, *(Want(at, "moment") for at in _moments(self.script))])
        in_order = heapq.merge(*streams, ((want, True) for want in wants), key=lambda each: each[0].at)
        ahead = _Ahead((item, is_odd, _prepared(item, self.script)) for item, is_odd in in_order)
        making = asyncio.create_task(ahead.run())
        for item, is_odd, heartbeat in ahead.items():
            while due <= item.at and not self.is_down:
                due = await self._round(due)
            if isinstance(item, Want):
                if item.reason in ("down", "told", "up"):
                    due = await self._outage(item)
            else:
                assert heartbeat is not None  # noqa: S101 - for mypy
                await self._add(item, heartbeat, is_odd)
            if is_odd and not self.is_down:
                due = min(due, _tick(item.at))
                if isinstance(item, Want):
                    self.whole_at = min(self.whole_at, _tick(item.at))
        await making
        while due <= self.script.end:
            due = await self._round(due)
        await self._round(_tick(self.script.end))

    async def _outage(self, want: Want) -> float:
        """Let an outage of ours begin or end. Return when the next round is due."""
        self.clock.t = want.at
        if want.reason != "told":
            await self._flush()
            await self._renew(want.at, was_down=want.reason == "up")
        self.is_down = want.reason != "up"
        told = 0 if want.reason == "down" else sum(route.for_nexhb for route in ROUTES)
        await self.voice.outage(is_down=self.is_down, told=told)
        return NEVER if self.is_down else _tick(want.at)

    async def _add(self, sent: Sent, heartbeat: Heartbeat, is_odd: bool) -> None:
        """Add a heartbeat to the batch. Each commit contains one odd heartbeat or one post of a kiosk at most, and none
        that follows it."""
        if self.batch and sent.at - self.batch[0][0].at > LONGEST_BATCH:
            await self._flush()
        elif self.odd.get(sent.number, sent.at) != sent.at:
            await self._flush(whole=False)
        self.batch.append((sent, heartbeat))
        if is_odd:
            self.odd[sent.number] = sent.at

    async def _flush(self, *, whole: bool = True) -> None:
        """Commit the batch; if not `whole`, only the heartbeats of kiosks with an odd one, or with a long interval."""
        if whole:
            batch, self.batch = self.batch, []
        else:
            numbers = self.odd.keys() | self.slow
            batch = [each for each in self.batch if each[0].number in numbers]
            self.batch = [each for each in self.batch if each[0].number not in numbers]
        self.odd = {}
        if batch:
            heartbeats = [heartbeat for _, heartbeat in batch]
            for heartbeat in heartbeats:
                self.looked_at = heartbeat.received_at
                self.troubles.look(heartbeat)
            await commit.write(self.session, heartbeats, self.intake)
            self.result.heartbeats += len(batch)

    async def _renew(self, at: float, *, was_down: bool = False) -> None:
        """Renew the row of the availability. Renewals since the last round are left out."""
        if not was_down and at - self.renewed_at > 5:
            await self.conn.execute("UPDATE taking_heartbeats SET renewed_at = $1", self.script.at(at - 5))
        await availability.renew(self.conn, self.script.at(at))
        self.renewed_at = at

    async def _round(self, at: float) -> float:
        """Run a round at `at`. Return when the next one is due."""
        await self._flush(whole=self.every_round or at >= self.whole_at)
        self.clock.t = at
        await self._renew(at)
        await self.troubles.flush()
        self.voice.set_disk(self.script)
        await self.watcher.round(self.conn)
        await self.voice.delivered(self.conn)
        self.result.rounds += 1
        if at - self.sampled_at >= SAMPLE_EVERY:
            rows = await self.conn.fetch("SELECT device_no FROM device_state WHERE presence = 'offline'")
            self.result.offline.append((at, frozenset(row["device_no"] for row in rows)))
            self.sampled_at = at
        if self.every_round:
            return at + TICK
        waited = settles_after(timedelta(seconds=60))
        next_at: datetime | None = await self.conn.fetchval(
            "SELECT least((SELECT min(due_at) FROM device_state), (SELECT min(settle_at) FROM device_outages),"
            " (SELECT min(mostly_back_at) + $1 FROM incidents WHERE resolved_at IS NULL),"
            " (SELECT min(t.reminded_at + r.every) FROM incident_routes t JOIN unnest($2::text[], $3::interval[])"
            " r (route, every) USING (route) WHERE t.resolved_at IS NULL AND t.reminded_at + r.every > $4))",
            waited, *zip(*_REMINDERS, strict=True), self.clock(),
        )  # fmt: skip
        self.whole_at = NEVER
        if next_at is not None:
            self.whole_at = max(
                at + TICK, math.ceil(round((next_at - self.script.start).total_seconds(), 3) / TICK) * TICK
            )
        return self.whole_at

    async def found(self) -> Found:
        result, conn = self.result, self.conn
        result.events = await conn.fetch("SELECT device_no, kind, since, at FROM device_events ORDER BY event_id")
        result.outages = await conn.fetch(
            "SELECT device_no, since, until, cause, settled_at FROM device_outages ORDER BY outage_no"
        )
        result.incidents = await conn.fetch(
            "SELECT kind, scope, site, device_no, opened_at, resolved_at, incident_id FROM incidents"
            " ORDER BY incident_id"
        )
        result.messages = await conn.fetch(
            "SELECT id, incident_id, route, kind, payload->>'scope' AS scope, created_at FROM notifications"
            " ORDER BY notification_no"
        )
        result.received = self.voice.receiver.messages
        await self._flush()  # those that no round needed
        result.days = await uptime.make(conn, self.script)
        return result


def _with_wants(kiosk: Kiosk, script: Script, every_round: bool) -> Iterator[tuple[Sent | Want, bool]]:
    """Yield what a kiosk sends, whether a round must follow, and the moments at which it may have become silent."""
    last: Sent | None = None
    content: tuple[object, ...] = ()
    for sent in sent_by(kiosk, script):
        before, content = content, sent[3:10]  # with whether it was queued
        is_odd = before != content or sent.queued
        if last is not None:
            is_usual = kiosk.interval > 60 and last.at > CALM and sent.at - last.at < kiosk.interval * 1.3
            if sent.at - last.at > 600 and not is_usual and not every_round:
                silent = silent_at(last.at, 600, script.ours)
                if silent < sent.at:
                    yield Want(silent, "silence"), True
                    is_odd = True
        yield sent, is_odd
        last = sent
    if last is not None and (silent := silent_at(last.at, 600, script.ours)) < script.end:
        yield Want(silent, "silence"), True


def _moments(script: Script) -> Iterator[float]:
    """Yield when something in the script begins or ends that no heartbeat shows, but that may make a message due."""
    for silence in script.silences:
        yield silence.end
    for span in script.disk:
        yield from span
    for clone in (each for kiosk in script.kiosks for each in kiosk.truths if each.kind == CLONE):
        yield from (at + minute * 60 for at in (clone.start, clone.end + HOUR) for minute in range(-4, 5))
    for hour in {OPENS, *(route.quiet[1] for route in ROUTES if route.quiet)}:
        yield from script.each_day_at(hour)


def _prepared(item: Sent | Want, script: Script) -> Heartbeat | None:
    return _heartbeat(item, script) if isinstance(item, Sent) else None


def _tick(at: float) -> float:
    """Return the first round after `at`."""
    return (math.floor(at / TICK) + 1) * TICK


@cache
def _id(number: int) -> str:
    return f"kiosk-{number:04d}"


def _heartbeat(sent: Sent, script: Script) -> Heartbeat:
    at, number, made, boot, battery_pct, plugged, unity, clock_wrong, version, _, cloned = sent
    ts, received_at = script.at(made), script.at(at)
    label = _LABELS.setdefault(version, Label(version, "2.1.0", "wifi", "store"))
    facts = _FACTS_OF_CLONE if cloned else _FACTS
    return Heartbeat(
        number,
        _id(number),
        ts,
        received_at,
        bucket_of(ts, 10),
        clock_wrong,
        label,
        battery_pct,
        plugged,
        31.5,
        None,
        -60,
        int(made - boot),
        900,
        unity,
        facts,
        None,
        None,
        (),
    )
