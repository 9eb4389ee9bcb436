"""NexMDM's own database, whatever its version: read in short read-only transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import asyncpg

from nexhb import sql
from nexhb.db import CONNECT_TIMEOUT_S, Connection, Database
from nexhb.errors import BadInput, DatabaseUnavailable
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


@dataclass(frozen=True)
class Source:
    """An open NexMDM database."""

    conn: Connection
    name: str  # which it is, whatever its address
    clock: datetime
    partitioned: bool
    by_time: bool  # its rows can be read in the order of their time

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

    async def count(self, start: datetime, end: datetime) -> int:
        """Its heartbeats from `start` to before `end`."""
        return int(await self.conn.fetchval(_Q["count"], _naive(start), _naive(end)))

    async def outside(self, start: datetime, end: datetime) -> tuple[bool, bool]:
        """Whether it has older ones, and newer ones."""
        row = await self.conn.fetchrow(_Q["outside"], _naive(start), _naive(end))
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        return row["older"], row["newer"]

    async def read(self, start: datetime, end: datetime, after: Place, most: int) -> list[asyncpg.Record]:
        """The next heartbeats behind `after`: of each device in the order of time, across devices as its indexes
        have it."""
        bounds = (_naive(start), _naive(end))
        if self.by_time:
            rows = await self.conn.fetch(_Q["next_by_time"], *bounds, _naive(after.ts), after.hb_id, most)
        else:
            rows = await self.conn.fetch(
                _Q["next_by_device"], *bounds, after.device_id, _naive(after.ts), after.hb_id, most
            )
        return list(rows)

    async def day(self, start: datetime, end: datetime, bucket_s: int, taken: list[str]) -> Counts:
        """What it has from `start` to before `end`, counted by itself; `taken`: the devices that nexhb has."""
        row = await self.conn.fetchrow(_Q["day"], _naive(start), _naive(end), bucket_s, taken)
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Counts(row["rows"], row["refused"], row["keys"])

    async def keys(self, start: datetime, end: datetime, bucket_s: int, devices: list[str]) -> list[asyncpg.Record]:
        """Each device and bucket (seconds since 1970) once."""
        rows: list[asyncpg.Record] = await self.conn.fetch(_Q["keys"], _naive(start), _naive(end), bucket_s, devices)
        return rows


@asynccontextmanager
async def opened(
    dsn: str,
    *,
    name: str = "--source",
    application: str = "nexhb import-legacy",
    timeout_s: float = STATEMENT_TIMEOUT_S,
) -> AsyncIterator[Source]:
    """The database behind `dsn`, called `name` in messages, for the block; each statement ends after `timeout_s`.
    Raises BadInput where it is no NexMDM's, DatabaseUnavailable."""
    how: dict[str, Any] = {
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
            yield await _looked_at(conn)
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(f"The source: {error.detail}", hint=error.hint) from error


async def _looked_at(conn: Connection) -> Source:
    shape = await conn.fetchrow(_Q["shape"])
    assert shape is not None  # noqa: S101 - a SELECT without FROM has one row
    for table, columns in (("devices", shape["device_columns"]), ("device_heartbeats", shape["heartbeat_columns"])):
        if missing := _NEEDED[table] - set(columns or ()):
            raise BadInput(f"the source is no NexMDM database: {table} has no {', '.join(sorted(missing))}.")
    try:
        system = "@" + await conn.fetchval(_Q["system"])
    except asyncpg.InsufficientPrivilegeError:
        system = ""
    return Source(conn, shape["database"] + system, shape["clock"], shape["partitioned"], shape["by_time"])


def _naive(moment: datetime) -> datetime:
    """As its columns without a zone have it."""
    return moment.astimezone(UTC).replace(tzinfo=None)
