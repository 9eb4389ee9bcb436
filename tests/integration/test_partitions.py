"""Days are created while other processes create days too; their state is checked again under the lock."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta

import asyncpg
import pytest

from nexhb import partitions, retirement
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from tests.conftest import SOON_S

DAY = date(2026, 6, 15)
NAME, START, END = partitions.table_name(DAY), partitions.midnight(DAY), partitions.midnight(DAY + timedelta(days=1))
WAITS = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def tables(conn: Connection) -> int:
    """Return the number of the day's tables, attached or not."""
    return int(await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = $1", NAME))


async def test_a_process_that_waited_for_another_uses_the_days_that_it_created(
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


async def test_a_day_that_was_archived_during_the_wait_for_the_lock_is_not_created_again(
    database: Database, conn: Connection
) -> None:
    """If the day was created again, its new rows would exist beside its archive."""
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


async def test_a_day_that_is_being_detached_does_not_count_as_ahead_and_gets_no_rows(
    database: Database, conn: Connection
) -> None:
    days = partitions.days_between(DAY, DAY + timedelta(days=2))
    assert await partitions.ensure(conn, days) == {day: partitions.table_name(day) for day in days}
    assert await partitions.days_ahead(conn, DAY) == 2
    async with database.connected(application="a reader") as reader, reader.transaction():
        await reader.fetch("SELECT FROM device_heartbeats")
        last = partitions.table_name(days[2])
        await conn.execute("SET lock_timeout = 300")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {last} CONCURRENTLY")
        assert [p.detach_pending for p in await partitions.attached(conn)] == [False, False, True]
        assert await partitions.days_ahead(conn, DAY) == 1
        assert await partitions.ensure(conn, days) == {day: partitions.table_name(day) for day in days[:2]}


async def test_a_sealed_day_that_was_attached_accepts_rows_once_it_is_registered(conn: Connection) -> None:
    await partitions.ensure(conn, [DAY])
    await retirement.detach(conn, NAME)
    assert await retirement.seal(conn, NAME, START, END) == 0
    assert await retirement.seal(conn, NAME, START, END) == 0, "the day was sealed already"
    await conn.execute(partitions.attach_statement(NAME, START, END))
    assert await partitions.ensure(conn, [DAY]) == {}
    await retirement.register(conn, NAME, START, END)
    assert await partitions.ensure(conn, [DAY]) == {DAY: NAME}
    assert not await retirement.is_sealed(conn, NAME)
