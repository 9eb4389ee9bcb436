"""Days that are made: by whom, beside whom, and what is looked at once more under the lock."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta

import asyncpg
import pytest

from nexhb import partitions
from nexhb.db import Connection, Database
from nexhb.locks import Lock
from tests.conftest import SOON_S

DAY = date(2026, 6, 15)
NAME, START, END = partitions.name_of(DAY), partitions.midnight(DAY), partitions.midnight(DAY + timedelta(days=1))
WAITS = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def tables(conn: Connection) -> int:
    """How many there are for the day, attached or not."""
    return int(await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = $1", NAME))


async def test_who_makes_a_day_waits_for_another_and_takes_the_days_that_one_made(
    database: Database, conn: Connection
) -> None:
    async with database.connected(application="another") as other:
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", int(Lock.PARTITIONS))
            await other.execute(partitions.create_statement(NAME))
            await other.execute(partitions.attach_statement(NAME, START, END))
            making = asyncio.create_task(partitions.ensure(conn, [DAY]))
            async with asyncio.timeout(SOON_S):
                while not await other.fetch(WAITS):
                    assert not making.done()
                    await asyncio.sleep(0.01)
        assert await making == {DAY: NAME}
    assert await tables(conn) == 1


async def test_a_day_that_went_while_somebody_waited_for_the_lock_is_not_made_again(
    database: Database, conn: Connection
) -> None:
    """Its rows would stand beside its archive."""
    async with database.connected(application="another") as other:
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", int(Lock.PARTITIONS))
            making = asyncio.create_task(partitions.ensure(conn, [DAY]))
            async with asyncio.timeout(SOON_S):
                while not await other.fetch(WAITS):
                    assert not making.done()
                    await asyncio.sleep(0.01)
            query = "INSERT INTO hb_partitions (partition_name, range_start, range_end, state) VALUES ($1, $2, $3, $4)"
            await other.execute(query, NAME, START, END, "dropped")
        assert await making == {}
    assert await tables(conn) == 0


async def test_a_day_that_is_on_its_way_out_is_neither_ahead_nor_for_rows(database: Database, conn: Connection) -> None:
    days = partitions.days_between(DAY, DAY + timedelta(days=2))
    assert await partitions.ensure(conn, days) == {day: partitions.name_of(day) for day in days}
    assert await partitions.days_ahead(conn, DAY) == 2
    async with database.connected(application="a reader") as reader, reader.transaction():
        await reader.fetch("SELECT FROM device_heartbeats")
        last = partitions.name_of(days[2])
        await conn.execute("SET lock_timeout = 300")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {last} CONCURRENTLY")
        assert [p.detach_pending for p in await partitions.attached(conn)] == [False, False, True]
        assert await partitions.days_ahead(conn, DAY) == 1
        assert await partitions.ensure(conn, days) == {day: partitions.name_of(day) for day in days[:2]}


async def test_a_day_that_was_attached_behind_its_seal_takes_rows_once_it_is_adopted(conn: Connection) -> None:
    await partitions.ensure(conn, [DAY])
    await partitions.detach(conn, NAME)
    assert await partitions.seal(conn, NAME, START, END) == 0
    assert await partitions.seal(conn, NAME, START, END) == 0, "a second time it is so already"
    await conn.execute(partitions.attach_statement(NAME, START, END))
    assert await partitions.ensure(conn, [DAY]) == {}
    await partitions.adopt(conn, NAME, START, END)
    assert await partitions.ensure(conn, [DAY]) == {DAY: NAME}
    assert not await partitions.is_sealed(conn, NAME)
