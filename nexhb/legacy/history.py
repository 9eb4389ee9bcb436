"""NexMDM's heartbeats into the history, a day at a time: how far it is is committed with the rows themselves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from asyncpg import Record

from nexhb import partitions, sql, staging
from nexhb.db import Connection
from nexhb.legacy import devices as legacy_devices
from nexhb.legacy import rows
from nexhb.legacy.devices import Devices
from nexhb.legacy.source import START, Place, Source
from nexhb.partitions import midnight
from nexhb.pgerrors import Kind, classify

_Q = sql.queries("legacy")

CHUNK = 2_000  # rows a transaction: 20 to 40 ms, for which a live heartbeat may have to wait
OVERLAP = timedelta(minutes=5)  # read again of a day that grew: who committed late is among them

Tell = Callable[[int], None]  # rows read since it was called last


@dataclass
class Pace:
    """Not more than `rate` rows a second, from when it was made."""

    rate: float
    clock: Callable[[], float] = time.monotonic
    due: float = 0.0

    def wait_s(self, count: int) -> float:
        """How long to wait after `count` rows. What was not used is not saved up, but for the time that these took:
        ingest would feel the burst."""
        now, takes_s = self.clock(), count / self.rate
        self.due = max(self.due, now - takes_s) + takes_s
        return max(self.due - now, 0.0)


@dataclass
class Day:
    """One day (UTC) of the source, up to where this run reads."""

    day: date
    start: datetime
    end: datetime
    source_rows: int = 0
    read: int = 0  # in this run
    written: int = 0  # in all runs
    written_now: int = 0
    deduplicated: int = 0
    copies: int = 0  # of these: rows of heartbeats that nexhb made a row of at another time
    copied: set[tuple[int, int]] = field(default_factory=set)  # device and bucket of those that this run read
    has_own: bool = False  # nexhb itself took heartbeats about that time
    refused_because: str = ""  # the whole of it
    failed: bool = False  # refused in the middle
    after: Place = START
    begun: bool = False  # there is a row of it in legacy_days
    finished: bool = False
    finished_rows: int | None = None

    @property
    def is_due(self) -> bool:
        """Whether there is something to read: it was never read to its end, or it grew since."""
        return not self.refused_because and not (self.finished and self.finished_rows == self.source_rows)


@dataclass
class History:
    """Takes days, one after the other."""

    source: Source
    conn: Connection  # uses packed inet
    devices: Devices
    now: datetime
    bucket_s: int
    pace: Pace
    tell: Tell
    dropped: Counter[str] = field(default_factory=Counter)  # values that became null, by column
    unknown: set[str] = field(default_factory=set)  # device ids that its devices table does not have
    _labels: staging.Labels = field(default_factory=staging.Labels)

    async def plan(self, first: date, until: datetime) -> list[Day]:
        """The days from `first` to the one before whose end `until` lies, and what is known of them."""
        known = {row["day"]: row for row in await self.conn.fetch(_Q["days"], self.source.name)}
        days = []
        for day in partitions.days_between(first, until.date()):
            start = midnight(day)
            one = Day(day, start, min(start + timedelta(days=1), until))
            one.source_rows = await self.source.count(one.start, one.end)
            if row := known.get(day):
                one.after = Place(row["after_device"], row["after_ts"], row["after_hb"])
                one.written, one.deduplicated = row["written"], row["deduplicated"]
                one.copies = row["copies"]
                one.begun, one.finished, one.finished_rows = True, bool(row["finished_at"]), row["source_rows"]
            if one.source_rows:
                one.has_own = await self.conn.fetchval(_Q["has_own"], day)
                days.append(one)
        return days

    async def take(self, day: Day) -> None:
        """Read what is due of one day. A day that nexhb has archived already is refused."""
        if day.finished:
            # What is read a second time is found by its key. Without an index on the time, that is all of the day.
            behind = Place("", day.after.ts - OVERLAP, START.hb_id) if self.source.by_time else START
            day.after = behind
        await self._to_the_end(day)

    async def again(self, day: Day) -> None:
        """All of one day, from its start."""
        day.after = START
        await self._to_the_end(day)

    async def _to_the_end(self, day: Day) -> None:
        table = (await partitions.ensure(self.conn, [day.day])).get(day.day)
        if table is None:
            reason = await partitions.gone(self.conn, day.day)
            day.refused_because = f"nexhb's own day is {reason or 'gone'} already"
            return
        try:
            while chunk := await self.source.read(day.start, day.end, day.after, CHUNK):
                await self._write(day, table, chunk)
                self.tell(len(chunk))
                await asyncio.sleep(self.pace.wait_s(len(chunk)))
        except Exception as error:
            if classify(error) is not Kind.NO_PARTITION:
                raise
            day.refused_because, day.failed = "nexhb archived its own day meanwhile", True

    async def finish(self, day: Day, deduplicated: int) -> None:
        """The day was read to its end; `deduplicated`: rows of the source whose bucket has another's row, or none as
        they are copies. The ledger counts those too that the source has dropped since."""
        if not day.begun:
            return
        known = max(deduplicated, day.deduplicated)
        await self.conn.execute(
            _Q["finish"], self.source.name, day.day, day.source_rows, known, known - day.deduplicated, self.now,
            day.copies,
        )  # fmt: skip

    async def _write(self, day: Day, table: str, chunk: list[Record]) -> None:
        converted = await self._converted(chunk)
        await self._labels.learn(self.conn, (row.label for row in converted))
        records = [row.record(self._labels[row.label]) for row in converted]
        last = chunk[-1]
        place = Place(last["device_id"], last["read_as"].astimezone(UTC), last["hb_id"])
        new = await partitions.patiently(self._commit, day, table, place, records)
        day.after, day.begun, day.finished = place, True, False
        day.read += len(chunk)
        day.written += new
        day.written_now += new

    async def _commit(self, day: Day, table: str, place: Place, records: list[tuple[object, ...]]) -> int:
        async with self.conn.transaction():
            await staging.stage(self.conn, records)
            if day.has_own and records:
                await self.conn.execute(_Q["count_staged"])
                copies = await self.conn.fetch(_Q["drop_copies"], *_span(records))
                day.copied |= {(row["device_no"], row["bucket"]) for row in copies}
            new = len(await staging.insert_staged(self.conn))
            await self.conn.execute(_Q["advance"], self.source.name, day.day, *place, new, table)
        return new

    async def _converted(self, chunk: list[Record]) -> list[rows.Row]:
        """The first row of each device and bucket."""
        await self._know_devices(chunk)
        found: dict[tuple[int, int], rows.Row] = {}
        dropped: list[str] = []
        numbers = self.devices.numbers
        for row in chunk:
            device_no = numbers.get(row["device_id"])
            if device_no is not None:
                one = rows.heartbeat(row, device_no, self.bucket_s, dropped)
                found.setdefault(one.key, one)
        self.dropped.update(dropped)
        return list(found.values())

    async def _know_devices(self, chunk: list[Record]) -> None:
        """Devices that the old system has enrolled since the run began are taken now."""
        strangers = {row["device_id"] for row in chunk} - self.devices.numbers.keys() - self.unknown
        if strangers - self.devices.not_taken:
            self.devices.grow(await legacy_devices.take(self.source, self.conn, self.now))
            self.unknown |= strangers - self.devices.numbers.keys()


def _span(records: list[tuple[object, ...]]) -> tuple[object, object]:
    """The earliest ts of these rows, and the latest."""
    moments = [record[0] for record in records if isinstance(record[0], datetime)]
    return min(moments), max(moments)
