"""What stands against a detach is named for what it is: the SQLSTATE (55000) of several things is the same. And where a
new day's table lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from nexhb import doctor, migrate, partitions
from nexhb.archive import catalog, restore
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.doctor import Line
from nexhb.errors import NotDetachable, PartitionBusy
from tests import servers
from tests.integration.test_nightly import NOW, OLD, House, house  # noqa: F401 - a fixture

DAY = date(2026, 6, 1)


@pytest.fixture
async def day(conn: Connection) -> str:
    """A day's table."""
    return (await partitions.ensure(conn, [DAY, DAY + timedelta(days=1)]))[DAY]


async def line(conn: Connection, name: str, folder: Path) -> Line:
    """One of the doctor's."""
    return next(x for x in await doctor.examine(conn, Settings(data_dir=folder), datetime.now(UTC)) if x.name == name)


async def test_a_default_partition_is_named_with_the_way_out(conn: Connection, day: str, tmp_path: Path) -> None:
    """It said that another detach was pending, and there was none."""
    await conn.execute("CREATE TABLE stray PARTITION OF device_heartbeats DEFAULT")
    with pytest.raises(NotDetachable, match=r'DEFAULT partition stray\. .*DETACH PARTITION "stray"'):
        await partitions.detach(conn, day)
    found = await line(conn, "detaches", tmp_path)
    assert (found.good, "stray" in found.said) == (False, True)
    await conn.execute('ALTER TABLE device_heartbeats DETACH PARTITION "stray"')
    await partitions.detach(conn, day)
    assert day not in [one.name for one in await partitions.attached(conn)]


async def test_another_detach_that_is_pending_is_named(conn: Connection, database: Database, day: str) -> None:
    other = partitions.name_of(DAY + timedelta(days=1))
    async with database.connected(application="a report") as reader:
        await reader.execute("BEGIN; SELECT count(*) FROM device_heartbeats")
        await conn.execute("SET lock_timeout = '200ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {other} CONCURRENTLY")
        with pytest.raises(PartitionBusy, match=f"{day} cannot be detached while the detach of {other} is pending"):
            await partitions.detach(conn, day)
    await partitions.detach(conn, other)
    await partitions.detach(conn, day)
    assert await partitions.attached(conn) == []


@pytest.fixture
def two_phase() -> Iterator[Database]:
    """A server that takes prepared transactions."""
    with servers.running(max_prepared_transactions="5") as dsn:
        yield Database(dsn)


async def test_a_prepared_transaction_is_named_with_what_ends_it(
    two_phase: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to no session: what held the table up was "its lock was busy", by pid None."""
    monkeypatch.setattr(partitions, "ATTEMPTS", 1)
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 1_200)
    monkeypatch.setattr(doctor, "STRANGER_MOST_S", 0)
    async with two_phase.connected(application="test") as conn, two_phase.connected(application="other") as other:
        await migrate.migrate(conn, NOW)
        name = (await partitions.ensure(conn, [DAY]))[DAY]
        await other.execute("BEGIN; LOCK TABLE device_heartbeats IN SHARE MODE; PREPARE TRANSACTION 'it''s two'")
        with pytest.raises(PartitionBusy, match=r"prepared transaction it's two .*ROLLBACK PREPARED 'it''s two'"):
            await partitions.detach(conn, name)
        found = await line(conn, "locks", tmp_path)
        assert (found.good, "ROLLBACK PREPARED 'it''s two'" in found.remedy) == (False, True)
        await other.execute("ROLLBACK PREPARED 'it''s two'")
        assert (await line(conn, "locks", tmp_path)).good
        await partitions.detach(conn, name)
        assert await partitions.attached(conn) == []


SPACES = """SELECT c.relname, coalesce(t.spcname, 'the default') FROM pg_class c
LEFT JOIN pg_tablespace t ON t.oid = c.reltablespace WHERE c.relname LIKE 'device\\_heartbeats\\_%'"""


@pytest.fixture
async def spaces(conn: Connection) -> AsyncIterator[None]:
    """Two tablespaces, and one of them the default of the database."""
    name = await conn.fetchval("SELECT current_database()")
    await conn.execute("SET allow_in_place_tablespaces = on")
    for space in ("large", "small"):
        await conn.execute(f"CREATE TABLESPACE {space} LOCATION ''")
    await conn.execute(f"ALTER DATABASE {name} SET default_tablespace = small")
    yield
    await conn.execute(f"ALTER DATABASE {name} RESET ALL")
    for kind in ("TABLE", "INDEX"):
        await conn.execute(f"ALTER {kind} ALL IN TABLESPACE large SET TABLESPACE pg_default")
    await conn.execute("ALTER TABLE device_heartbeats SET TABLESPACE pg_default")
    for space in ("large", "small"):
        await conn.execute(f"DROP TABLESPACE {space}")


@pytest.mark.usefixtures("spaces")
async def test_a_new_day_and_a_restored_one_lie_where_their_parent_does(house: House) -> None:  # noqa: F811
    """They went wherever default_tablespace said: a full disk in place of the one that was bought for them."""
    conn, database = house.conn, house.database
    async with database.connected(application="test", lock_timeout="2000") as own:
        await partitions.ensure(own, [NOW.date()])
        assert {row[1] for row in await conn.fetch(SPACES)} == {"the default"}
        await house.fill(OLD)
        assert (await house.nightly()).status == "completed"
        await conn.execute("ALTER TABLE device_heartbeats SET TABLESPACE large")
        await restore.restore_day(own, house.store, await catalog.find(own, OLD), NOW)
        await partitions.ensure(own, [NOW.date() + timedelta(days=20)])
    found = {row[0]: row[1] for row in await conn.fetch(SPACES)}
    for day in (OLD, NOW.date() + timedelta(days=20)):
        name = partitions.name_of(day)
        assert (found[name], found[f"{name}_key"]) == ("large", "large")
    assert found[partitions.name_of(NOW.date())] == "the default"
    async with asyncio.timeout(30), conn.transaction():
        assert len(await house.rows(OLD)) == 150
