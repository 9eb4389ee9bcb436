"""Days of history that are over: filled as a fleet fills them, closed as the nightly run closes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import asyncpg

from bench import history
from bench.fleet import MICROS, Device
from nexhb import partitions, sql
from nexhb.batch import HISTORY_COLUMNS

_P = sql.queries("partitions")
_DAY_S = 86_400


async def make(conn: asyncpg.Connection, fleet: Sequence[Device], day: date, beats: int, seed: int) -> int:
    """An attached day with `beats` heartbeats of each device, spread over it; how many rows."""
    table = (await partitions.ensure(conn, [day]))[day]
    writer = await history.Writer.of(conn, fleet)
    start_us = round(partitions.midnight(day).timestamp()) * MICROS
    rows = 0
    for batch in history.lived(len(fleet), beats, _DAY_S // beats, start_us, seed):
        rows += await writer.write(writer.heartbeats(batch), table, as_they_come=True)
    await _close(conn, table)
    return rows


async def make_aside(conn: asyncpg.Connection, of: date, day: date) -> None:
    """A table with the rows of another day, in their order on disk, each so many days later; not attached yet."""
    name, later = partitions.name_of(day), day - of
    changed = {"ts": "ts + $1", "received_at": "received_at + $1", "bucket": f"bucket + {later.days * _DAY_S}"}
    await conn.execute(partitions.create_statement(name))
    # else a scan may begin in the middle of the table
    await conn.execute("SET synchronize_seqscans = off")
    await conn.execute(
        f"INSERT INTO {name} ({', '.join(HISTORY_COLUMNS)}) "
        f"SELECT {', '.join(changed.get(column, column) for column in HISTORY_COLUMNS)} "
        f"FROM {partitions.name_of(of)}",
        later,
    )
    await _close(conn, name)


async def attach(conn: asyncpg.Connection, day: date) -> None:
    """Attach a day that was made aside."""
    name, start = partitions.name_of(day), partitions.midnight(day)
    end = partitions.midnight(date.fromordinal(day.toordinal() + 1))
    await conn.execute(partitions.attach_statement(name, start, end))
    await conn.execute(_P["record"], name, start, end)


async def _close(conn: asyncpg.Connection, table: str) -> None:
    """As the nightly run does once no heartbeat can come any more. The checkpoint is not to fall into a measurement."""
    await conn.execute(f"VACUUM (FREEZE, ANALYZE) {table}")
    await conn.execute("CHECKPOINT")
