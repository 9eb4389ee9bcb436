"""Numbers of devices and labels. Every history row refers to them, so none may be missing or be assigned twice."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg
from asyncpg import Record

from nexhb import log
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("numbers")
_log = log.get("numbers")

SAMPLE_ROWS = 500_000  # number of rows of a day that `nexhb doctor` checks; `nexhb audit` checks every row


@dataclass(frozen=True)
class Dangling:
    """Numbers of rows that refer to a missing device, or to a missing label."""

    devices: int
    labels: int

    def __add__(self, other: Dangling) -> Dangling:
        """Return the sums of both counts."""
        return Dangling(self.devices + other.devices, self.labels + other.labels)


async def dangling(conn: Connection, table: str) -> Dangling:
    """Count the dangling rows of a day's table. `table` is its quoted name."""
    return _dangling(await conn.fetchrow(_Q["dangling"].replace("$table", table)))


async def dangling_in_sample(conn: Connection, table: str, rows: float) -> Dangling:
    """Count the dangling rows in a sample of SAMPLE_ROWS. `rows` is the table's approximate number of rows."""
    percent = min(100.0, 100 * SAMPLE_ROWS / max(rows, 1.0))
    sample = f"(SELECT device_no, label_no FROM {table} TABLESAMPLE SYSTEM ({percent:.6f}))"  # noqa: S608 - quoted by the caller
    return await dangling(conn, sample)


async def dangling_late(conn: Connection, start: datetime, end: datetime) -> Dangling:
    """Count the dangling late heartbeats with start ≤ ts < end."""
    return _dangling(await conn.fetchrow(_Q["dangling_late"], start, end))


async def dangling_statuses(conn: Connection) -> int:
    """Count the last statuses of missing devices."""
    return int(await conn.fetchval(_Q["dangling_statuses"]))


def _dangling(row: Record | None) -> Dangling:
    assert row is not None  # noqa: S101 - an aggregate has one row
    return Dangling(row["devices"], row["labels"])


async def lagging_sequences(conn: Connection) -> list[Record]:
    """Return the sequences that would assign a number already in use, as rows with the columns what, sequence, given
    and used.
    """
    return [row for row in await conn.fetch(_Q["sequences"]) if row["given"] < row["used"]]


async def raise_sequences(conn: Connection) -> None:
    """Advance each lagging sequence to the largest number in use.

    A sequence lags after a data-only restore, and after a crash soon after CREATE DATABASE … TEMPLATE (the copy assumes
    that the WAL already covers its next 32 numbers). A locked table is skipped after a short wait, because devices wait
    for this start; `nexhb doctor` checks the sequences too.
    """
    try:
        async with conn.transaction():
            await conn.execute(_Q["short_lock_timeout"])
            lagging = await lagging_sequences(conn)
    except (
        asyncpg.LockNotAvailableError,
        asyncpg.UndefinedTableError,
    ) as error:  # only a warning: the next statement that needs the table fails with this error
        _log.warning("database.sequences_not_read", error=str(error))
        return
    for row in lagging:
        await conn.execute(_Q["raise"], row["sequence"], row["used"])
        _log.warning("database.sequence_raised", what=row["what"], given=row["given"], used=row["used"])
