"""Import NexMDM's heartbeats into the history, a day at a time. Progress is committed together with the rows."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from asyncpg import Record

from nexhb import partitions
from nexhb.ingest import staging
from nexhb.ingest.labels import Labels
from nexhb.nexmdm import devices as nexmdm_devices
from nexhb.nexmdm import rows
from nexhb.nexmdm.devices import ImportedDevices
from nexhb.nexmdm.source import START, NexmdmDatabase, RowPosition
from nexhb.partitions import midnight
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.errors import Kind, classify

_Q = sql.queries("nexmdm_import")

ROWS_PER_TRANSACTION = 2_000  # such a transaction takes 20 to 40 ms, and a live heartbeat may wait for it
OVERLAP = timedelta(minutes=5)  # if a day grew, its last minutes are read again: rows may have been committed late

Progress = Callable[[int], None]  # called with the number of rows read since the previous call


@dataclass
class Pace:
    """Limits the import to `rate` rows a second."""

    rate: float
    clock: Callable[[], float] = time.monotonic
    due: float = 0.0

    def wait_s(self, count: int) -> float:
        """Return how long to wait after `count` rows. If the import was idle before, only as much of the idle time
        counts as `count` rows take at `rate`: otherwise many rows could be read at once after a long pause, and delay
        ingest."""
        now, takes_s = self.clock(), count / self.rate
        self.due = max(self.due, now - takes_s) + takes_s
        return max(self.due - now, 0.0)


@dataclass
class ImportedDay:
    """One day (UTC) of the source, as far as this run reads it."""

    day: date
    start: datetime
    end: datetime
    source_rows: int = 0
    read: int = 0  # rows read in this run
    written: int = 0  # rows written in all runs
    written_now: int = 0
    deduplicated: int = 0
    copies: int = 0  # deduplicated rows of heartbeats that nexhb stored with another ts
    copied: set[tuple[int, int]] = field(default_factory=set)  # device and bucket of copies read in this run
    has_own: bool = False  # nexhb itself received heartbeats of this day or of the day before
    rejected_because: str = ""  # why the whole day cannot be imported
    failed: bool = False  # whether the day was rejected after some rows were imported
    after: RowPosition = START
    begun: bool = False  # whether the day has a row in legacy_days
    finished: bool = False
    finished_rows: int | None = None

    @property
    def is_due(self) -> bool:
        """Whether there are rows to read: the day was never read to its end, or has more rows since then."""
        return not self.rejected_because and not (self.finished and self.finished_rows == self.source_rows)


@dataclass
class HistoryImport:
    """Imports heartbeats, one day after the other."""

    source: NexmdmDatabase
    conn: Connection  # this connection reads and writes inet in packed form
    devices: ImportedDevices
    now: datetime
    bucket_s: int
    pace: Pace
    progress: Progress
    dropped: Counter[str] = field(default_factory=Counter)  # number of values that became null, by column
    unknown: set[str] = field(default_factory=set)  # device ids that the source's devices table does not have
    _labels: Labels = field(default_factory=Labels)

    async def plan(self, first: date, until: datetime) -> list[ImportedDay]:
        """Return the days from `first` to the day of `until` for which the source has rows, with their progress."""
        progress = {row["day"]: row for row in await self.conn.fetch(_Q["days"], self.source.name)}
        days = []
        for date_ in partitions.days_between(first, until.date()):
            start = midnight(date_)
            day = ImportedDay(date_, start, min(start + timedelta(days=1), until))
            day.source_rows = await self.source.count(day.start, day.end)
            if row := progress.get(date_):
                day.after = RowPosition(row["after_device"], row["after_ts"], row["after_hb"])
                day.written, day.deduplicated = row["written"], row["deduplicated"]
                day.copies = row["copies"]
                day.begun, day.finished, day.finished_rows = True, bool(row["finished_at"]), row["source_rows"]
            if day.source_rows:
                day.has_own = await self.conn.fetchval(_Q["has_own"], date_)
                days.append(day)
        return days

    async def import_due(self, day: ImportedDay) -> None:
        """Import the rows of a day that are due. A day that nexhb has already archived is rejected."""
        if day.finished:
            # Rows that are read twice are recognised by their key. Without an index on ts, the whole day is read again.
            day.after = RowPosition("", day.after.ts - OVERLAP, START.hb_id) if self.source.by_time else START
        await self._import(day)

    async def import_again(self, day: ImportedDay) -> None:
        """Import the whole day again, from its start."""
        day.after = START
        await self._import(day)

    async def _import(self, day: ImportedDay) -> None:
        table = (await partitions.ensure(self.conn, [day.day])).get(day.day)
        if table is None:
            reason = await partitions.reason_not_to_create(self.conn, day.day)
            day.rejected_because = f"nexhb's partition for this day is {reason or 'gone'}"
            return
        try:
            while chunk := await self.source.read(day.start, day.end, day.after, ROWS_PER_TRANSACTION):
                await self._write(day, table, chunk)
                self.progress(len(chunk))
                await asyncio.sleep(self.pace.wait_s(len(chunk)))
        except Exception as error:
            if classify(error) is not Kind.NO_PARTITION:
                raise
            day.rejected_because, day.failed = "nexhb archived this day during the import", True

    async def finish(self, day: ImportedDay, deduplicated: int) -> None:
        """Record that the day was read to its end. `deduplicated` is the number of the source's rows that were not
        written, because their bucket has another row or they are copies. Rows that the source has deleted since are
        still counted in the ledger."""
        if not day.begun:
            return
        total = max(deduplicated, day.deduplicated)
        await self.conn.execute(
            _Q["finish"], self.source.name, day.day, day.source_rows, total, total - day.deduplicated, self.now,
            day.copies,
        )  # fmt: skip

    async def _write(self, day: ImportedDay, table: str, chunk: list[Record]) -> None:
        converted = await self._convert(chunk)
        await self._labels.learn(self.conn, (row.label for row in converted))
        records = [row.record(self._labels[row.label]) for row in converted]
        last = chunk[-1]
        position = RowPosition(last["device_id"], last["read_as"].astimezone(UTC), last["hb_id"])
        new = await partitions.retry_while_locked(self._commit, day, table, position, records)
        day.after, day.begun, day.finished = position, True, False
        day.read += len(chunk)
        day.written += new
        day.written_now += new

    async def _commit(
        self, day: ImportedDay, table: str, position: RowPosition, records: list[tuple[object, ...]]
    ) -> int:
        async with self.conn.transaction():
            await staging.stage(self.conn, records)
            if day.has_own and records:
                await self.conn.execute(_Q["count_staged"])
                copies = await self.conn.fetch(_Q["drop_copies"], *_span(records))
                day.copied |= {(row["device_no"], row["bucket"]) for row in copies}
            new = len(await staging.insert_staged(self.conn))
            await self.conn.execute(_Q["advance"], self.source.name, day.day, *position, new, table)
        return new

    async def _convert(self, chunk: list[Record]) -> list[rows.SourceRow]:
        """Convert the rows of `chunk`, but only the first row of each device and bucket."""
        await self._import_new_devices(chunk)
        converted: dict[tuple[int, int], rows.SourceRow] = {}
        dropped: list[str] = []
        numbers = self.devices.numbers
        for row in chunk:
            device_no = numbers.get(row["device_id"])
            if device_no is not None:
                heartbeat = rows.heartbeat(row, device_no, self.bucket_s, dropped)
                converted.setdefault(heartbeat.key, heartbeat)
        self.dropped.update(dropped)
        return list(converted.values())

    async def _import_new_devices(self, chunk: list[Record]) -> None:
        """Import devices that enrolled in NexMDM after the run began."""
        new_ids = {row["device_id"] for row in chunk} - self.devices.numbers.keys() - self.unknown
        if new_ids - self.devices.rejected_ids:
            self.devices.update(await nexmdm_devices.import_all(self.source, self.conn, self.now))
            self.unknown |= new_ids - self.devices.numbers.keys()


def _span(records: list[tuple[object, ...]]) -> tuple[object, object]:
    """Return the earliest and the latest ts of these rows."""
    moments = [record[0] for record in records if isinstance(record[0], datetime)]
    return min(moments), max(moments)
