"""Measure how fast PostgreSQL is without a daemon: SELECT 1, a one-row commit, rows by COPY alone."""

from __future__ import annotations

import time
from statistics import median
from typing import Final, NamedTuple

from bench import stack
from nexhb.heartbeat import HISTORY_COLUMNS

_TABLE: Final = "bench_copy"
_A_DAY: Final = """
SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'device_heartbeats'::regclass LIMIT 1
"""


class Floors(NamedTuple):
    """Median times of one client, in ms."""

    one_row_commit_ms: float
    select_1_ms: float


async def floors_of(own: stack.Stack, times: int = 500) -> Floors:
    """Measure SELECT 1 and a one-row commit, each `times` times, with one client of the daemon's PostgreSQL."""
    async with own.connected() as conn:
        await conn.execute("CREATE TABLE bench_commit (n integer)")
        medians = []
        for statement in ("INSERT INTO bench_commit VALUES (1)", "SELECT 1"):
            prepared, took = await conn.prepare(statement), []
            for _ in range(times):
                began = time.perf_counter()
                await prepared.fetch()
                took.append(time.perf_counter() - began)
            medians.append(round(median(took) * 1e3, 3))
        await conn.execute("DROP TABLE bench_commit")
    return Floors(*medians)


async def copy_rate(own: stack.Stack, batch_rows: int, seconds: float) -> float:
    """Return the rows/s of COPY alone, in transactions of `batch_rows` rows, run for `seconds`.

    The rows, enough for ten transactions, were written by the daemon before. They are sorted by their key and passed as
    Python objects (datetimes, addresses). The table has the layout and the key of a day's partition. The time in which
    the table is emptied does not count.
    """
    columns, elapsed, copied = ", ".join(HISTORY_COLUMNS), 0.0, 0
    async with own.connected() as conn:
        like = f"LIKE {await conn.fetchval(_A_DAY)} INCLUDING DEFAULTS INCLUDING INDEXES INCLUDING STORAGE"
        await conn.execute(f"CREATE TABLE {_TABLE} ({like})")
        query = f"SELECT {columns} FROM device_heartbeats ORDER BY device_no, bucket LIMIT $1"
        rows = [tuple(row) for row in await conn.fetch(query, 10 * batch_rows)]
        while elapsed < seconds:
            await conn.execute(f"TRUNCATE {_TABLE}")
            for at in range(0, len(rows), batch_rows):
                part = rows[at : at + batch_rows]
                began = time.perf_counter()
                await conn.copy_records_to_table(_TABLE, records=part, columns=HISTORY_COLUMNS)
                elapsed += time.perf_counter() - began
                copied += len(part)
        await conn.execute(f"DROP TABLE {_TABLE}")
    return copied / elapsed
