"""Read everything that the database and the archives contain after a run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import asyncpg

from bench.fleet import Device
from nexhb import partitions
from nexhb.archive import catalog, verify
from nexhb.archive.manifest import COLUMNS as ARCHIVED_COLUMNS
from nexhb.archive.opening import open_store
from nexhb.config import ArchiveSettings
from nexhb.errors import NexhbError
from nexhb.postgres import sql
from tests.faults.heartbeats import COLUMNS, Row, float32

Key = tuple[int, int]  # the device's number in the fleet, and the bucket

_HISTORY = f"SELECT bucket, {', '.join(COLUMNS)} FROM heartbeat_history"
_STATUS = f"SELECT {', '.join(COLUMNS)} FROM (SELECT *, last_ts AS ts FROM device_last_status) s"
_FACTS = "SELECT device_id, alias, android_version, sdk_int, patch_level, build_id, model, manufacturer FROM devices"


@dataclass
class Stored:
    """The rows of the history by key, and the last status and the facts of each device."""

    rows: dict[Key, list[Row]]
    statuses: dict[int, Row]
    facts: dict[int, Row]
    damaged: list[str]  # archives that do not match the catalog, and why

    @property
    def days(self) -> list[date]:
        """Return the days that have a row."""
        return sorted({rows[0][1].date() for rows in self.rows.values()})


_LATE = sql.queries("archive")["spelled_out"].replace("$table", "late_heartbeats")
_NUMBERS = ("battery_pct", "signal_dbm", "uptime_s", "ram_used_mb")
_PARSERS: dict[str, Callable[[str], Any]] = {
    **{name: lambda text: text == "t" for name in ("clock_wrong", "plugged", "unity_running")},
    **dict.fromkeys(_NUMBERS, int),
    "ts": datetime.fromisoformat,
    "temp_c": lambda text: float32(float(text)),
}


async def _archived(
    conn: asyncpg.Connection, archive: str, settings: ArchiveSettings, damaged: list[str]
) -> AsyncIterator[tuple[str, int, Row]]:
    """Yield device_id, bucket and row of each heartbeat that is only in an archive."""
    attached = {partition.name for partition in await partitions.attached(conn)}
    async with open_store(f"file://{archive}", settings) as store:
        for archived in await catalog.current_archives(conn):
            if archived.partition in attached:
                continue
            try:
                manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
                async for rows in verify.rows(store, manifest):
                    for texts in rows:
                        values = dict(zip(ARCHIVED_COLUMNS, texts, strict=True))
                        row = tuple(_PARSERS.get(name, str)(values[name]) if values[name] else None for name in COLUMNS)
                        yield values["device_id"], int(values["bucket"]), row
            except NexhbError as error:
                damaged.append(f"{archived.partition} in {archived.url}: {error}")


async def read(conn: asyncpg.Connection, fleet: Sequence[Device], archive: str, settings: ArchiveSettings) -> Stored:
    """Return everything: the attached days, the late heartbeats of days that were dropped, and the archives."""
    numbers = {device.device_id: number for number, device in enumerate(fleet)}
    rows: dict[Key, list[Row]] = {}
    async with conn.transaction(isolation="repeatable_read"):
        for record in [*await conn.fetch(_HISTORY), *await conn.fetch(_LATE)]:
            rows.setdefault((numbers[record["device_id"]], record["bucket"]), []).append(_row(record))
        statuses = {numbers[record["device_id"]]: _row(record) for record in await conn.fetch(_STATUS)}
        facts = {numbers[record["device_id"]]: tuple(record)[1:] for record in await conn.fetch(_FACTS)}
    damaged: list[str] = []
    async for device_id, bucket, row in _archived(conn, archive, settings, damaged):
        rows.setdefault((numbers[device_id], bucket), []).append(row)
    return Stored(rows, statuses, facts, damaged)


def _row(record: asyncpg.Record) -> Row:
    return tuple(str(record[name]) if name == "ip" and record[name] else record[name] for name in COLUMNS)
