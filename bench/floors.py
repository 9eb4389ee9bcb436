"""What the same PostgreSQL takes for the least there is to do: SELECT 1, a one-row commit, rows by COPY alone."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import asyncpg

from bench import history
from bench.fleet import Device
from bench.load.batches import Queue
from nexhb import batch, wire

_TABLE: Final = "bench_copy"
_A_DAY: Final = """
SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'device_heartbeats'::regclass LIMIT 1
"""


class Orientation(NamedTuple):
    """One client, medians in ms."""

    one_row_commit_ms: float
    select_1_ms: float


async def orientation(conn: asyncpg.Connection, times: int = 500) -> Orientation:
    """Measure both, so many times each."""
    await conn.execute("CREATE TABLE bench_commit (n integer)")
    try:
        commit = await _median_ms(conn, "INSERT INTO bench_commit VALUES (1)", times)
        return Orientation(commit, await _median_ms(conn, "SELECT 1", times))
    finally:
        await conn.execute("DROP TABLE bench_commit")


async def _median_ms(conn: asyncpg.Connection, statement: str, times: int) -> float:
    prepared, took = await conn.prepare(statement), []
    for _ in range(times):
        began = time.perf_counter()
        await prepared.fetch()
        took.append(time.perf_counter() - began)
    return round(median(took) * 1e3, 3)


def as_people_have_them(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A packed row of the history, its values as a program has them and asyncpg takes them: datetimes, an address."""
    moments, rest, ip = row[:2], row[2:-1], row[-1]
    return (*map(wire.unpack_moment, moments), *rest, None if ip is None else ipaddress.ip_address(ip[4:]))


class Copy:
    """COPY of rows as the daemon would write them, into a table of the history's layout with its key. The connection
    takes packed values where the rows are."""

    def __init__(self, conn: asyncpg.Connection, rows: list[tuple[Any, ...]]) -> None:
        """`rows`: sorted by their key."""
        self._conn = conn
        self._rows = rows

    @classmethod
    async def of(cls, conn: asyncpg.Connection, fleet: Sequence[Device], queues: Sequence[Queue]) -> Copy:
        """The rows of these queues' bodies; an empty table like a day's partition."""
        partition = await conn.fetchval(_A_DAY)
        await conn.execute(f"DROP TABLE IF EXISTS {_TABLE}")
        await conn.execute(
            f"CREATE TABLE {_TABLE} (LIKE {partition} INCLUDING DEFAULTS INCLUDING INDEXES INCLUDING STORAGE)"
        )
        writer = await history.Writer.of(conn, fleet)
        beats = [history.Beat(each.device, made_us, n) for each in queues for n, made_us in enumerate(each.made_us)]
        return cls(conn, await writer.rows(writer.heartbeats(beats)))

    def plainly(self, conn: asyncpg.Connection) -> Copy:
        """The same rows, not packed, over a connection that nothing was done to."""
        return Copy(conn, [as_people_have_them(row) for row in self._rows])

    async def rate(self, batch_rows: int, seconds: float) -> float:
        """Rows/s of transactions of so many rows, for so long; emptied off the clock whenever all are in."""
        taken = rows = 0.0
        while taken < seconds:
            await self._conn.execute(f"TRUNCATE {_TABLE}")
            for at in range(0, len(self._rows) - batch_rows + 1, batch_rows):
                part = self._rows[at : at + batch_rows]
                began = time.perf_counter()
                await self._conn.copy_records_to_table(_TABLE, records=part, columns=batch.HISTORY_COLUMNS)
                taken += time.perf_counter() - began
                rows += len(part)
                if taken >= seconds:
                    break
        return rows / taken

    async def drop(self) -> None:
        """Remove the table."""
        await self._conn.execute(f"DROP TABLE IF EXISTS {_TABLE}")
