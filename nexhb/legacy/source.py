"""NexMDM's own database, whatever its version: read in short read-only transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from nexhb import sql
from nexhb.db import CONNECT_TIMEOUT_S, Connection, Database
from nexhb.errors import BadInput, DatabaseUnavailable
from nexhb.legacy import zones
from nexhb.legacy.zones import Fold, Zone
from nexhb.session import Home

_Q = sql.queries("nexmdm")

STATEMENT_TIMEOUT_S = 600.0  # the longest counts a day without an index on its time
DEVICES_AT_ONCE = 5_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NEEDED = {
    "devices": {"id", "alias", "token_hash"},
    "device_heartbeats": {"hb_id", "device_id", "ts"},
}
_MARKS = {"devices": "token_hash", "device_heartbeats": "hb_id"}  # by which its tables are known


class Place(NamedTuple):
    """Behind this row of a day."""

    device_id: str
    ts: datetime
    hb_id: int


START = Place("", _EPOCH, -(2**63))


class Standing(NamedTuple):
    """What its answers about devices are worth."""

    hashes: bool  # there are devices with a bcrypt hash alone
    standby: bool
    replayed: datetime | None  # by a standby: the commit that it replayed last
    clock: datetime


class Counts(NamedTuple):
    """What the source has of a day."""

    rows: int
    refused: int  # of devices that nexhb did not take
    keys: int  # different device and bucket of the others
    newest: datetime | None = None


class Ahead(NamedTuple):
    """Rows of the source from behind its clock."""

    rows: int
    newest: datetime | None
    clock: datetime


@dataclass(frozen=True)
class Source:
    """An open NexMDM database."""

    conn: Connection
    name: str  # which it is, whatever its address
    clock: datetime
    partitioned: bool
    by_time: bool  # its rows can be read in the order of their time
    zone: Zone  # of its columns without one; the session's
    zoned: bool  # the heartbeats' own time has one
    is_standby: bool
    folds: tuple[Fold, ...] = ()  # local times that were there twice

    async def devices(self, *, hashes_alone: bool = False) -> AsyncIterator[list[asyncpg.Record]]:
        """All of its devices by id, some at a time; or those of which it has nothing but a bcrypt hash."""
        after = ""
        while rows := await self.conn.fetch(_Q["devices"], after, DEVICES_AT_ONCE, None, hashes_alone):
            yield rows
            after = rows[-1]["id"]

    async def devices_of(self, token_ids: list[str]) -> list[asyncpg.Record]:
        """Its devices with these tokens, each the SHA-256 as hexadecimal digits."""
        rows: list[asyncpg.Record] = await self.conn.fetch(_Q["devices"], "", DEVICES_AT_ONCE, token_ids, False)
        return rows

    async def standing(self) -> Standing:
        """What its answers about devices are worth now."""
        row = await self.conn.fetchrow(_Q["standing"])
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        return Standing(row["hashes"], row["standby"], row["replayed"], row["clock"])

    async def among(self, ids: list[str]) -> list[str]:
        """Which of these devices it has."""
        return [row["id"] for row in await self.conn.fetch(_Q["among"], ids)]

    async def count(self, start: datetime, end: datetime) -> int:
        """Its heartbeats from `start` to before `end`."""
        return int(await self.conn.fetchval(_Q["count"], start, end))

    async def has_older(self, start: datetime) -> bool:
        """Whether it has heartbeats from before."""
        return bool(await self.conn.fetchval(_Q["older"], start))

    async def ahead(self) -> Ahead:
        """Its heartbeats that lie behind its own clock, now."""
        row = await self.conn.fetchrow(_Q["ahead"])
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Ahead(*row)

    async def read(self, start: datetime, end: datetime, after: Place, most: int) -> list[asyncpg.Record]:
        """The next heartbeats behind `after`: of each device in the order of time, across devices as its indexes
        have it."""
        fold = self._fold(start, end)
        if self.by_time:
            rows = await self.conn.fetch(_Q["next_by_time"], start, end, after.ts, after.hb_id, most, *fold)
        else:
            rows = await self.conn.fetch(_Q["next_by_device"], start, end, *after, most, *fold)
        return list(rows)

    async def day(self, start: datetime, end: datetime, bucket_s: int, taken: list[str]) -> Counts:
        """What it has from `start` to before `end`, counted by itself; `taken`: the devices that nexhb has."""
        row = await self.conn.fetchrow(_Q["day"], start, end, bucket_s, taken, *self._fold(start, end))
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Counts(*row)

    async def keys(self, start: datetime, end: datetime, bucket_s: int, devices: list[str]) -> list[asyncpg.Record]:
        """Each device and bucket (seconds since 1970) once."""
        rows: list[asyncpg.Record] = await self.conn.fetch(
            _Q["keys"], start, end, bucket_s, devices, *self._fold(start, end)
        )
        return rows

    def _fold(self, start: datetime, end: datetime) -> tuple[datetime, timedelta, int]:
        """The repeated hour of this time, as the queries take it. A day has one at most."""
        return next((fold for fold in self.folds if fold.touches(start, end)), zones.NO_HOUR_IS_REPEATED)


@asynccontextmanager
async def opened(
    dsn: str,
    timezone: str | None = None,
    *,
    name: str = "--source",
    application: str = "nexhb import-legacy",
    timeout_s: float = STATEMENT_TIMEOUT_S,
    for_history: bool = True,
) -> AsyncIterator[Source]:
    """The database behind `dsn`, called `name` in messages, for the block; each statement ends after `timeout_s`. Its
    times are read as of `timezone`, or as its own settings say.

    Raises BadInput where it is no NexMDM's, or its time zone is not clear and it is opened for its history;
    DatabaseUnavailable."""
    how: dict[str, Any] = {
        "timezone": None,  # as the source's own settings have it, which zones.find looks at
        "application": application,
        "command_timeout_s": timeout_s + 5,
        "timeout_s": min(timeout_s, CONNECT_TIMEOUT_S),
        "statement_timeout": f"{timeout_s * 1000:.0f}",
        "default_transaction_read_only": "on",
        "lock_timeout": "10000",
        "idle_in_transaction_session_timeout": "10000",
    }
    try:
        async with Database(dsn, Home(marks=_MARKS), name).connected(**how) as conn:
            yield await _looked_at(conn, timezone, for_history=for_history)
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(f"The source: {error.detail}", hint=error.hint) from error


async def _looked_at(conn: Connection, timezone: str | None, *, for_history: bool) -> Source:
    shape = await conn.fetchrow(_Q["shape"])
    assert shape is not None  # noqa: S101 - a SELECT without FROM has one row
    for table, columns in (("devices", shape["device_columns"]), ("device_heartbeats", shape["heartbeat_columns"])):
        if missing := _NEEDED[table] - set(columns or ()):
            raise BadInput(f"the source is no NexMDM database: {table} has no {', '.join(sorted(missing))}.")
    try:
        system = "@" + await conn.fetchval(_Q["system"])
    except asyncpg.InsufficientPrivilegeError:
        system = ""
    zone = await zones.find(conn, timezone, matters=for_history and not shape["zoned"])
    return Source(
        conn, shape["database"] + system, shape["clock"], shape["partitioned"], shape["by_time"], zone, shape["zoned"],
        shape["standby"],
    )  # fmt: skip
