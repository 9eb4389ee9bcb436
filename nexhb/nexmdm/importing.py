"""Run the import from NexMDM: the devices, then the heartbeats day by day. Each day is compared after it is read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

from nexhb.errors import BadInput
from nexhb.nexmdm import compare, deleted, devices, zones
from nexhb.nexmdm.compare import KeyCounts
from nexhb.nexmdm.deleted import DeletedDevices
from nexhb.nexmdm.devices import ImportedDevices
from nexhb.nexmdm.history import HistoryImport, ImportedDay, Pace
from nexhb.nexmdm.source import DayCounts, FutureRows, NexmdmDatabase
from nexhb.nexmdm.zones import RepeatedHour, Zone
from nexhb.partitions import midnight
from nexhb.postgres import connections, sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("nexmdm_import")

Progress = Callable[[int, int, float], None]  # heartbeats read, total to read, heartbeats read per second


@dataclass(frozen=True)
class Options:
    """The options of the command, and the settings of nexhb that matter here."""

    days: int
    rate: float  # the maximum number of rows a second
    retention_days: int
    bucket_s: int
    repeated_hour: RepeatedHour | None = None  # None: the choice of an earlier import
    revoke_deleted: bool = False
    max_revoked: int | None = None


@dataclass(frozen=True)
class DayComparison:
    """A day on both sides, NexMDM's (the source) and nexhb's, as numbers of rows."""

    day: date
    source: int
    source_keys: int  # distinct pairs of device and bucket (keys), for the devices that nexhb has
    read_now: int
    written: int  # rows written by all runs
    written_now: int
    deduplicated: int  # rows whose bucket already had a row, from the source or from nexhb itself
    rejected: int
    missing: int  # keys that have no row in nexhb
    copies: int = 0  # deduplicated rows of heartbeats that nexhb stored with another ts
    newest: datetime | None = None
    rejected_because: str = ""
    failed: bool = False

    @property
    def agrees(self) -> bool:
        """Whether each row of the source is accounted for, and each of its keys has a row in nexhb."""
        if self.rejected_because:
            return not self.failed
        # The source has fewer rows than were imported if NexMDM has deleted some since.
        return self.missing == 0 and self.source <= self.written + self.deduplicated + self.rejected

    def shown(self) -> dict[str, Any]:
        """Return the comparison in the form of the command's JSON."""
        because = {"refused_because": self.rejected_because} if self.rejected_because else {}
        return {
            "day": f"{self.day}", "source": self.source, "source_keys": self.source_keys, "read_now": self.read_now,
            "written": self.written, "written_now": self.written_now, "deduplicated": self.deduplicated,
            "refused": self.rejected, "missing": self.missing, "copies": self.copies, "agrees": self.agrees, **because,
        }  # fmt: skip


@dataclass
class ImportResult:
    """The result of an import, and whether both sides agree."""

    source: str
    since: date
    until: datetime
    zone: Zone
    devices: ImportedDevices
    days: list[DayComparison] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # values that became null in this run, by column
    unknown_ids: set[str] = field(default_factory=set)  # ids in the source's history that are not in its table devices
    older_left: str = ""  # why older rows were not imported
    deleted: DeletedDevices = field(default_factory=DeletedDevices)
    future: FutureRows | None = None  # rows with a time after the source's clock, which were not imported
    seconds: float = 0.0

    @property
    def differing_days(self) -> list[DayComparison]:
        """The days on which both sides do not agree."""
        return [day for day in self.days if not day.agrees]

    @property
    def disagreements(self) -> list[str]:
        """Why both sides do not agree; empty if they do."""
        days = ", ".join(f"{day.day}" for day in self.differing_days)
        reasons = [f"both sides do not agree on {days}"] if days else []
        if self.future and self.future.rows:
            reasons.append(f"{self.future.rows:,} heartbeats are ahead of the source's clock")
        return reasons

    @property
    def newest(self) -> datetime | None:
        """The time of the source's newest heartbeat, as read in the time zone `zone`."""
        return max((day.newest for day in self.days if day.newest), default=None)

    @property
    def failures(self) -> list[str]:
        """What the import could not do; empty if it did everything."""
        because = self.deleted.not_revoked_because
        return self.disagreements + ([f"deleted devices were not revoked: {because}"] if because else [])

    def total(self, name: str) -> int:
        """Return the sum of a count over all days."""
        return sum(getattr(day, name) for day in self.days)

    def totals(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sums of these counts over all days, by their names in JSON."""
        return {("refused" if name == "rejected" else name): self.total(name) for name in names}

    def counts(self) -> dict[str, Any]:
        """Return the counts that are stored with the run."""
        names = ("source", "read_now", "written_now", "deduplicated", "rejected", "missing")
        return {"devices": self.devices.seen} | self.totals(names)

    def shown(self) -> dict[str, Any]:
        """Return the result in the form of the command's JSON."""
        of = self.devices
        names = ("source", "read_now", "written", "written_now", "deduplicated", "copies", "rejected", "missing")
        return {
            "source": self.source, "since": f"{self.since}", "until": self.until,
            "timezone": self.zone.name, "timezone_from": self.zone.set_by, "newest": self.newest,
            "devices": {
                "source": of.seen, "taken": len(of.numbers), "made": of.made, "tokens_added": of.tokens_added,
                "hashes_waiting": of.hashes_waiting, "tokens_revoked": of.tokens_revoked, "renamed": of.renamed,
                "refused": dict(of.reasons), "refused_devices": [list(item) for item in of.rejected],
                "values_dropped": dict(of.dropped),
                "deleted": self.deleted.alive[: devices.MAX_NAMED], "deleted_count": len(self.deleted.alive),
                "deleted_own_token": self.deleted.own_token[: devices.MAX_NAMED],
                "deleted_revoked": self.deleted.revoked[: devices.MAX_NAMED],
                "deleted_not_revoked_because": self.deleted.not_revoked_because,
            },
            "heartbeats": self.totals(names) | {"values_dropped": dict(self.dropped)},
            "strangers": sorted(self.unknown_ids)[: devices.MAX_NAMED],
            "days": [day.shown() for day in self.days],
            "older_left": self.older_left, "ahead": self.future.rows if self.future else 0,
            "newest_ahead": self.future.newest if self.future else None, "agrees": not self.disagreements,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip


async def run(
    source: NexmdmDatabase, conn: Connection, now: datetime, options: Options, progress: Progress
) -> ImportResult:
    """Import what the source has and nexhb lacks. Nothing else may use `conn` during the import. If a run is killed,
    the next run continues where it stopped.

    Raise BadInput if the time zone of the source's times is ambiguous."""
    await connections.use_packed(conn)
    started = time.monotonic()
    days = min(options.days, options.retention_days)
    first = source.clock.date() - timedelta(days=days)
    source = await _with_folds(source, conn, midnight(first), options.repeated_hour)
    result = ImportResult(source.name, first, source.clock, source.zone, await devices.import_all(source, conn, now))
    history = HistoryImport(source, conn, result.devices, now, options.bucket_s, Pace(options.rate), lambda _: None)
    planned = await history.plan(first, source.clock)
    history.progress = _cumulative(sum(day.source_rows for day in planned if day.is_due), progress)
    for day in planned:
        result.days.append(await _import_day(history, day))
    result.future = await source.future_rows()
    if await source.has_older(midnight(first)):
        result.older_left = (
            f"partitions.retention_days is {options.retention_days}: the next nightly run would archive them"
            if options.days >= options.retention_days
            else f"--days is {options.days}"
        )
    if options.revoke_deleted:
        result.deleted = await deleted.revoke(source, conn, result.devices, options.max_revoked, now)
    else:
        result.deleted = await deleted.find(source, conn, result.devices)
    result.dropped, result.unknown_ids = history.dropped, history.unknown
    result.seconds = time.monotonic() - started
    return result


async def _with_folds(
    source: NexmdmDatabase, conn: Connection, first: datetime, repeated: RepeatedHour | None
) -> NexmdmDatabase:
    """Return the source with its repeated hours. Raise BadInput if an earlier import read the times in another way."""
    earlier = await conn.fetchrow(_Q["source"], source.name)
    if earlier and earlier["since"] and not source.zoned:
        before, zone = earlier["timezone"], source.zone
        if not await zones.is_same(source.conn, before, zone.name, earlier["since"], source.clock):
            raise BadInput(
                f"earlier imports read the times of {source.name} as {before}; now they are {zone.name} "
                f"({zone.set_by}).",
                hint=f"Give --source-timezone {before} if that was right. If not: docs/moving.md#a-wrong-time-zone.",
            )
        if repeated and earlier["repeated_hour"] not in (None, repeated):
            raise BadInput(
                f"earlier imports were given --repeated-hour {earlier['repeated_hour']}; it cannot be changed."
            )
    chosen = repeated or (earlier["repeated_hour"] if earlier else None)
    if not source.zoned:
        changes = await zones.changes(source.conn, first - timedelta(days=1), source.clock + timedelta(hours=3))
        source = replace(source, folds=await zones.folds(source.conn, changes, source.clock, chosen))
    await conn.execute(_Q["note_source"], source.name, source.zone.name, chosen)
    return source


def _cumulative(rows: int, progress: Progress) -> Callable[[int], None]:
    started, done = time.monotonic(), 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, max(rows, done), done / max(time.monotonic() - started, 0.001))

    return add


async def _import_day(history: HistoryImport, day: ImportedDay) -> DayComparison:
    was_due = day.is_due
    if was_due:
        await history.import_due(day)
    counts, keys = await _compare(history, day)
    if keys.missing:  # rows that the source committed during the import, in the part already read
        await history.import_again(day)
        counts, keys = await _compare(history, day)
    if day.rejected_because:
        return _rejected(day)
    day.source_rows = counts.rows
    remaining = min(keys.imported, day.written)  # the imported rows that the source still has
    deduplicated = counts.rows - counts.rejected - remaining - keys.missing
    if (was_due or day.read or not day.finished) and not keys.missing:
        await history.finish(day, deduplicated)
    return DayComparison(
        day.day, counts.rows, counts.keys, day.read, day.written, day.written_now, deduplicated, counts.rejected,
        keys.missing, day.copies, counts.newest,
    )  # fmt: skip


async def _compare(history: HistoryImport, day: ImportedDay) -> tuple[DayCounts, KeyCounts]:
    return (DayCounts(0, 0, 0), KeyCounts(0, 0)) if day.rejected_because else await compare.compare(history, day)


def _rejected(day: ImportedDay) -> DayComparison:
    return DayComparison(
        day.day, day.source_rows, 0, day.read, day.written, day.written_now, day.deduplicated, day.source_rows, 0,
        rejected_because=day.rejected_because, failed=day.failed,
    )  # fmt: skip
