"""Numbers of devices and labels: each row of the history names them, so none may be missing, or be given twice."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg
from asyncpg import Record

from nexhb import log, sql
from nexhb.db import Connection

_Q = sql.queries("numbers")
_log = log.get("numbers")

SAMPLE = 500_000  # rows of a day that doctor looks at; `nexhb audit` looks at all


@dataclass(frozen=True)
class Dangling:
    """Rows that name a device, or a label, that is not there."""

    devices: int
    labels: int

    def __add__(self, other: Dangling) -> Dangling:
        """Of both."""
        return Dangling(self.devices + other.devices, self.labels + other.labels)


async def dangling(conn: Connection, table: str) -> Dangling:
    """Of a day's table; `table`: its quoted name."""
    return _dangling(await conn.fetchrow(_Q["dangling"].replace("$table", table)))


async def dangling_in_sample(conn: Connection, table: str, rows: float) -> Dangling:
    """Of SAMPLE of a table's rows, where it has more; `rows`: how many it has, about."""
    percent = min(100.0, 100 * SAMPLE / max(rows, 1.0))
    sample = f"(SELECT device_no, label_no FROM {table} TABLESAMPLE SYSTEM ({percent:.6f}))"  # noqa: S608 - quoted by the caller
    return await dangling(conn, sample)


async def dangling_late(conn: Connection, start: datetime, end: datetime) -> Dangling:
    """Of late heartbeats with start ≤ ts < end."""
    return _dangling(await conn.fetchrow(_Q["dangling_late"], start, end))


async def dangling_statuses(conn: Connection) -> int:
    """Last statuses of a device that is not there."""
    return int(await conn.fetchval(_Q["dangling_statuses"]))


def _dangling(row: Record | None) -> Dangling:
    assert row is not None  # noqa: S101 - an aggregate has one row
    return Dangling(row["devices"], row["labels"])


async def behind(conn: Connection) -> list[Record]:
    """Sequences that would give a number that is in use: what, sequence, given, used."""
    return [row for row in await conn.fetch(_Q["sequences"]) if row["given"] < row["used"]]


async def raise_sequences(conn: Connection) -> None:
    """Set each sequence to the largest number in use, where it is behind: a restore of the data alone leaves it so, and
    a crash soon after CREATE DATABASE … TEMPLATE (the copy holds its next 32 numbers to be in the WAL already).
    A table that somebody has locked is not waited for, since devices wait for this start; `nexhb doctor` looks too."""
    try:
        async with conn.transaction():
            await conn.execute(_Q["briefly"])
            found = await behind(conn)
    except (asyncpg.LockNotAvailableError, asyncpg.UndefinedTableError) as error:  # who needs the table will say so
        _log.warning("database.sequences_not_read", error=str(error))
        return
    for row in found:
        await conn.execute(_Q["raise"], row["sequence"], row["used"])
        _log.warning("database.sequence_raised", what=row["what"], given=row["given"], used=row["used"])
