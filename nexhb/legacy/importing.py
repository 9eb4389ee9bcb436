"""The import from NexMDM as a whole: devices, then day by day its heartbeats, each day compared once it is read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

from nexhb import db, sql
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.legacy import compare, deleted, devices, zones
from nexhb.legacy.compare import Keys
from nexhb.legacy.deleted import Deleted
from nexhb.legacy.devices import Devices
from nexhb.legacy.history import Day, History, Pace
from nexhb.legacy.source import Ahead, Counts, Source
from nexhb.legacy.zones import Repeated, Zone
from nexhb.partitions import midnight

_Q = sql.queries("legacy")

Tell = Callable[[int, int, float], None]  # heartbeats read, of how many, a second


@dataclass(frozen=True)
class Options:
    """What is asked for, and what nexhb's own settings say."""

    days: int
    rate: float  # rows a second at most
    retention_days: int
    bucket_s: int
    repeated_hour: Repeated | None = None  # None: as an earlier import was told
    revoke_deleted: bool = False
    revoke_at_most: int | None = None


@dataclass(frozen=True)
class Compared:
    """A day on both sides, in rows."""

    day: date
    source: int
    source_keys: int  # different device and bucket, of the devices that nexhb has
    read_now: int
    written: int  # in all runs
    written_now: int
    deduplicated: int  # their bucket had its row: another's of the source, or one that was here before
    refused: int
    missing: int  # of the keys
    copies: int = 0  # of deduplicated: heartbeats that nexhb made a row of at another time
    newest: datetime | None = None
    refused_because: str = ""
    failed: bool = False

    @property
    def agrees(self) -> bool:
        """Whether each row of the source is accounted for, and each of its keys has its row here."""
        if self.refused_because:
            return not self.failed
        # Fewer, where the old system has dropped some since.
        return self.missing == 0 and self.source <= self.written + self.deduplicated + self.refused

    def shown(self) -> dict[str, Any]:
        """For machines."""
        because = {"refused_because": self.refused_because} if self.refused_because else {}
        return {
            "day": f"{self.day}", "source": self.source, "source_keys": self.source_keys, "read_now": self.read_now,
            "written": self.written, "written_now": self.written_now, "deduplicated": self.deduplicated,
            "refused": self.refused, "missing": self.missing, "copies": self.copies, "agrees": self.agrees, **because,
        }  # fmt: skip


@dataclass
class Imported:
    """What an import did, and whether both sides agree."""

    source: str
    since: date
    until: datetime
    zone: Zone
    devices: Devices
    days: list[Compared] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # of the heartbeats read now, by column
    strangers: set[str] = field(default_factory=set)  # ids in its history that are none of its devices
    older_left: str = ""  # why
    deleted: Deleted = field(default_factory=Deleted)
    ahead: Ahead | None = None  # what lies behind the source's clock, and was left
    seconds: float = 0.0

    @property
    def differs(self) -> list[Compared]:
        """Days on which they do not."""
        return [day for day in self.days if not day.agrees]

    @property
    def why_not(self) -> list[str]:
        """Why both sides do not agree; empty where they do."""
        days = ", ".join(f"{day.day}" for day in self.differs)
        found = [f"both sides do not agree on {days}"] if days else []
        if self.ahead and self.ahead.rows:
            found.append(f"{self.ahead.rows:,} heartbeats lie ahead of the source's clock")
        return found

    @property
    def newest(self) -> datetime | None:
        """When the newest heartbeat of the source was made, as its times are read."""
        return max((day.newest for day in self.days if day.newest), default=None)

    @property
    def failures(self) -> list[str]:
        """All that was to be done and was not."""
        because = self.deleted.not_revoked_because
        return self.why_not + ([f"deleted devices were not revoked: {because}"] if because else [])

    def total(self, name: str) -> int:
        """Of all days."""
        return sum(getattr(day, name) for day in self.days)

    def counts(self) -> dict[str, Any]:
        """What is written down of the run."""
        names = ("source", "read_now", "written_now", "deduplicated", "refused", "missing")
        return {"devices": self.devices.seen} | {name: self.total(name) for name in names}

    def shown(self) -> dict[str, Any]:
        """For machines."""
        of = self.devices
        names = ("source", "read_now", "written", "written_now", "deduplicated", "copies", "refused", "missing")
        return {
            "source": self.source, "since": f"{self.since}", "until": self.until,
            "timezone": self.zone.name, "timezone_from": self.zone.said_by, "newest": self.newest,
            "devices": {
                "source": of.seen, "taken": len(of.numbers), "made": of.made, "tokens_added": of.tokens_added,
                "hashes_waiting": of.hashes_waiting, "tokens_revoked": of.tokens_revoked, "renamed": of.renamed,
                "refused": dict(of.reasons), "refused_devices": [list(one) for one in of.refused],
                "values_dropped": dict(of.dropped),
                "deleted": self.deleted.alive[: devices.NAMED_MOST], "deleted_count": len(self.deleted.alive),
                "deleted_own_token": self.deleted.own_token[: devices.NAMED_MOST],
                "deleted_revoked": self.deleted.revoked[: devices.NAMED_MOST],
                "deleted_not_revoked_because": self.deleted.not_revoked_because,
            },
            "heartbeats": {name: self.total(name) for name in names} | {"values_dropped": dict(self.dropped)},
            "strangers": sorted(self.strangers)[: devices.NAMED_MOST],
            "days": [day.shown() for day in self.days],
            "older_left": self.older_left, "ahead": self.ahead.rows if self.ahead else 0,
            "newest_ahead": self.ahead.newest if self.ahead else None, "agrees": not self.why_not,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip


async def run(source: Source, conn: Connection, now: datetime, options: Options, tell: Tell) -> Imported:
    """Take what the source has and nexhb has not. `conn` is the caller's own. Killed anywhere, the next one goes on.

    Raises BadInput where it is not clear in which time zone the source's times are to be read."""
    await db.use_packed(conn)
    started = time.monotonic()
    days = min(options.days, options.retention_days)
    first = source.clock.date() - timedelta(days=days)
    source = await _understood(source, conn, midnight(first), options.repeated_hour)
    found = Imported(source.name, first, source.clock, source.zone, await devices.take(source, conn, now))
    history = History(source, conn, found.devices, now, options.bucket_s, Pace(options.rate), lambda _: None)
    planned = await history.plan(first, source.clock)
    history.tell = _total(sum(day.source_rows for day in planned if day.is_due), tell)
    for day in planned:
        found.days.append(await _one(history, day))
    found.ahead = await source.ahead()
    if await source.has_older(midnight(first)):
        found.older_left = (
            f"partitions.retention_days is {options.retention_days}: the next nightly run would archive them"
            if options.days >= options.retention_days
            else f"--days is {options.days}"
        )
    if options.revoke_deleted:
        found.deleted = await deleted.revoke(source, conn, found.devices, options.revoke_at_most, now)
    else:
        found.deleted = await deleted.find(source, conn, found.devices)
    found.dropped, found.strangers = history.dropped, history.unknown
    found.seconds = time.monotonic() - started
    return found


async def _understood(source: Source, conn: Connection, first: datetime, repeated: Repeated | None) -> Source:
    """The source with its repeated hours told apart, as every import of it reads them."""
    known = await conn.fetchrow(_Q["source"], source.name)
    if known and known["since"] and not source.zoned:
        was, is_now = known["timezone"], source.zone
        if not await zones.is_same(source.conn, was, is_now.name, known["since"], source.clock):
            raise BadInput(
                f"earlier imports read the times of {source.name} as {was}; now they are {is_now.name} "
                f"({is_now.said_by}).",
                hint=f"Give --source-timezone {was} if that was right. If not: docs/moving.md#a-wrong-time-zone.",
            )
        if repeated and known["repeated_hour"] not in (None, repeated):
            raise BadInput(f"earlier imports were given --repeated-hour {known['repeated_hour']}: it stays.")
    chosen = repeated or (known["repeated_hour"] if known else None)
    if not source.zoned:
        found = await zones.changes(source.conn, first - timedelta(days=1), source.clock + timedelta(hours=3))
        source = replace(source, folds=await zones.folds(source.conn, found, source.clock, chosen))
    await conn.execute(_Q["note_source"], source.name, source.zone.name, chosen)
    return source


def _total(rows: int, tell: Tell) -> Callable[[int], None]:
    started, done = time.monotonic(), 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        tell(done, max(rows, done), done / max(time.monotonic() - started, 0.001))

    return add


async def _one(history: History, day: Day) -> Compared:
    was_due = day.is_due
    if was_due:
        await history.take(day)
    counts, keys = await _compared(history, day)
    if keys.missing:  # what committed in the source while it was read, or was passed before it was written
        await history.again(day)
        counts, keys = await _compared(history, day)
    if day.refused_because:
        return _refused(day)
    day.source_rows = counts.rows
    own = min(keys.imported, day.written)  # of the rows that were written, those that the source has still
    deduplicated = counts.rows - counts.refused - own - keys.missing
    if (was_due or day.read or not day.finished) and not keys.missing:
        await history.finish(day, deduplicated)
    return Compared(
        day.day, counts.rows, counts.keys, day.read, day.written, day.written_now, deduplicated, counts.refused,
        keys.missing, day.copies, counts.newest,
    )  # fmt: skip


async def _compared(history: History, day: Day) -> tuple[Counts, Keys]:
    return (Counts(0, 0, 0), Keys(0, 0)) if day.refused_because else await compare.compare(history, day)


def _refused(day: Day) -> Compared:
    return Compared(
        day.day, day.source_rows, 0, day.read, day.written, day.written_now, day.deduplicated, day.source_rows, 0,
        refused_because=day.refused_because, failed=day.failed,
    )  # fmt: skip
