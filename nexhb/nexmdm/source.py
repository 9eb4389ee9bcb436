"""Read NexMDM's own database, of any version, in short read-only transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from nexhb.errors import BadInput, DatabaseUnavailable
from nexhb.nexmdm import zones
from nexhb.nexmdm.zones import Fold, Zone
from nexhb.postgres import sql
from nexhb.postgres.connections import CONNECT_TIMEOUT_S, Connection, Database
from nexhb.postgres.session import TableSchema

_Q = sql.queries("nexmdm")

STATEMENT_TIMEOUT_S = 600.0  # enough for the slowest statement, which counts a day without an index on ts
DEVICES_PER_PAGE = 5_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REQUIRED_COLUMNS = {
    "devices": {"id", "alias", "token_hash"},
    "device_heartbeats": {"hb_id", "device_id", "ts"},
}
_MARKS = {"devices": "token_hash", "device_heartbeats": "hb_id"}  # columns by which NexMDM's tables are recognised


class RowPosition(NamedTuple):
    """The position of a row in a day; reading continues after that row."""

    device_id: str
    ts: datetime
    hb_id: int


START = RowPosition("", _EPOCH, -(2**63))


class SourceState(NamedTuple):
    """Facts that decide whether the source's data about devices are up to date."""

    has_hashes: bool  # the source has devices with only a bcrypt hash
    is_standby: bool
    replayed: datetime | None  # the time of the last commit that a standby replayed
    clock: datetime


class DayCounts(NamedTuple):
    """Counts of the source's rows of a day."""

    rows: int
    rejected: int  # rows of devices that nexhb did not import
    keys: int  # distinct pairs of device and bucket in the rows that are not rejected
    newest: datetime | None = None


class FutureRows(NamedTuple):
    """Rows of the source with a time later than the source's clock."""

    rows: int
    newest: datetime | None
    clock: datetime


@dataclass(frozen=True)
class NexmdmDatabase:
    """An open NexMDM database."""

    conn: Connection
    name: str  # identifies the database, even at another address
    clock: datetime
    partitioned: bool
    by_time: bool  # an index allows reading rows in the order of their time
    zone: Zone  # zone of the session, in which columns without a time zone are read
    zoned: bool  # the column ts of the heartbeats has a time zone
    is_standby: bool
    folds: tuple[Fold, ...] = ()  # local times that occurred twice

    async def devices(self, *, only_hashed: bool = False) -> AsyncIterator[list[asyncpg.Record]]:
        """Yield the devices in the order of their ids, a page at a time: all devices, or those with only a bcrypt
        hash."""
        after = ""
        while rows := await self.conn.fetch(_Q["devices"], after, DEVICES_PER_PAGE, None, only_hashed):
            yield rows
            after = rows[-1]["id"]

    async def devices_with(self, token_ids: list[str]) -> list[asyncpg.Record]:
        """Return the devices with these tokens, each given as its SHA-256 in hexadecimal digits."""
        rows: list[asyncpg.Record] = await self.conn.fetch(_Q["devices"], "", DEVICES_PER_PAGE, token_ids, False)
        return rows

    async def state(self) -> SourceState:
        """Return the present state of the source."""
        row = await self.conn.fetchrow(_Q["state"])
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        return SourceState(row["hashes"], row["standby"], row["replayed"], row["clock"])

    async def existing(self, ids: list[str]) -> list[str]:
        """Return which of these device ids the source has."""
        return [row["id"] for row in await self.conn.fetch(_Q["existing"], ids)]

    async def count(self, start: datetime, end: datetime) -> int:
        """Return the number of heartbeats with `start` ≤ ts < `end`."""
        return int(await self.conn.fetchval(_Q["count"], start, end))

    async def has_older(self, start: datetime) -> bool:
        """Return whether there are heartbeats from before `start`."""
        return bool(await self.conn.fetchval(_Q["older"], start))

    async def future_rows(self) -> FutureRows:
        """Return the heartbeats with a time later than the source's clock."""
        row = await self.conn.fetchrow(_Q["future_rows"])
        assert row is not None  # noqa: S101 - an aggregate has one row
        return FutureRows(*row)

    async def read(self, start: datetime, end: datetime, after: RowPosition, limit: int) -> list[asyncpg.Record]:
        """Return the next heartbeats after `after`, ordered by time, or by device and time if no index allows that."""
        fold = self._fold(start, end)
        if self.by_time:
            rows = await self.conn.fetch(_Q["next_by_time"], start, end, after.ts, after.hb_id, limit, *fold)
        else:
            rows = await self.conn.fetch(_Q["next_by_device"], start, end, *after, limit, *fold)
        return list(rows)

    async def day(self, start: datetime, end: datetime, bucket_s: int, imported: list[str]) -> DayCounts:
        """Count the rows with `start` ≤ ts < `end` in the source. `imported` are the ids of devices that nexhb has."""
        row = await self.conn.fetchrow(_Q["day"], start, end, bucket_s, imported, *self._fold(start, end))
        assert row is not None  # noqa: S101 - an aggregate has one row
        return DayCounts(*row)

    async def keys(self, start: datetime, end: datetime, bucket_s: int, devices: list[str]) -> list[asyncpg.Record]:
        """Return the distinct pairs of device and bucket (in seconds since 1970)."""
        rows: list[asyncpg.Record] = await self.conn.fetch(
            _Q["keys"], start, end, bucket_s, devices, *self._fold(start, end)
        )
        return rows

    def _fold(self, start: datetime, end: datetime) -> tuple[datetime, timedelta, int]:
        """Return the repeated hour of this day as parameters of the queries; a day has at most one."""
        return next((fold for fold in self.folds if fold.overlaps(start, end)), zones.NO_REPEATED_HOUR)


@asynccontextmanager
async def opened(
    dsn: str,
    timezone: str | None = None,
    *,
    name: str = "--source",
    application: str = "nexhb import-legacy",
    timeout_s: float = STATEMENT_TIMEOUT_S,
    for_history: bool = True,
) -> AsyncIterator[NexmdmDatabase]:
    """Open the database at `dsn` for the block. Messages call the database `name`; a statement times out after
    `timeout_s`. Times are read in the zone `timezone`, or in the zone of the database's settings.

    Raise BadInput if it is not a NexMDM database, or if `for_history` is true and the time zone is ambiguous. Raise
    DatabaseUnavailable."""
    how: dict[str, Any] = {
        "timezone": None,  # do not set it: zones.find reads the setting of the source
        "application": application,
        "command_timeout_s": timeout_s + 5,
        "timeout_s": min(timeout_s, CONNECT_TIMEOUT_S),
        "statement_timeout": f"{timeout_s * 1000:.0f}",
        "default_transaction_read_only": "on",
        "lock_timeout": "10000",
        "idle_in_transaction_session_timeout": "10000",
    }
    try:
        async with Database(dsn, TableSchema(tables=_MARKS), name).connected(**how) as conn:
            yield await _inspect(conn, timezone, for_history=for_history)
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(f"The source: {error.detail}", hint=error.hint) from error


async def _inspect(conn: Connection, timezone: str | None, *, for_history: bool) -> NexmdmDatabase:
    shape = await conn.fetchrow(_Q["shape"])
    assert shape is not None  # noqa: S101 - a SELECT without FROM has one row
    for table, columns in (("devices", shape["device_columns"]), ("device_heartbeats", shape["heartbeat_columns"])):
        if missing := _REQUIRED_COLUMNS[table] - set(columns or ()):
            raise BadInput(f"the source is not a NexMDM database: {table} has no {', '.join(sorted(missing))}.")
    try:
        system = "@" + await conn.fetchval(_Q["system"])
    except asyncpg.InsufficientPrivilegeError:
        system = ""
    zone = await zones.find(conn, timezone, matters=for_history and not shape["zoned"])
    return NexmdmDatabase(
        conn, shape["database"] + system, shape["clock"], shape["partitioned"], shape["by_time"], zone, shape["zoned"],
        shape["standby"],
    )  # fmt: skip
