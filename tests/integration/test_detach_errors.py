"""The reason of a failed detach is named, though several reasons have the same SQLSTATE (55000). Also, the tablespace
of a new day's table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from nexhb import partitions, retirement
from nexhb.archive import catalog, restore
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.doctor import database as database_checks
from nexhb.doctor.check import CheckResult
from nexhb.errors import NotDetachable, PartitionBusy
from nexhb.postgres import migrate
from nexhb.postgres.connections import Connection, Database
from tests import postgres_servers
from tests.conftest import SOON_S
from tests.support.nightly import NOW, OLD, House

DAY = date(2026, 6, 1)


@pytest.fixture
async def day(conn: Connection) -> str:
    """Create a day's table and return its name."""
    return (await partitions.ensure(conn, [DAY, DAY + timedelta(days=1)]))[DAY]


async def line(conn: Connection, name: str, folder: Path) -> CheckResult:
    """Return the doctor's result for the check of this name."""
    return next(
        x for x in await checks.run_checks(conn, Settings(data_dir=folder), datetime.now(UTC)) if x.name == name
    )


async def test_a_default_partition_is_named_with_the_remedy(conn: Connection, day: str, tmp_path: Path) -> None:
    """Formerly, the message claimed that another detach was pending, although none was."""
    await conn.execute("CREATE TABLE stray PARTITION OF device_heartbeats DEFAULT")
    with pytest.raises(NotDetachable, match=r'DEFAULT partition "stray"\. .*DETACH PARTITION "stray"'):
        await retirement.detach(conn, day)
    result = await line(conn, "detaches", tmp_path)
    assert (result.passed, "stray" in result.detail) == (False, True)
    await conn.execute('ALTER TABLE device_heartbeats DETACH PARTITION "stray"')
    await retirement.detach(conn, day)
    assert day not in [one.name for one in await partitions.attached(conn)]


async def test_another_pending_detach_is_named(conn: Connection, database: Database, day: str) -> None:
    other = partitions.table_name(DAY + timedelta(days=1))
    async with database.connected(application="a report") as reader:
        await reader.execute("BEGIN; SELECT count(*) FROM device_heartbeats")
        await conn.execute("SET lock_timeout = '200ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {other} CONCURRENTLY")
        with pytest.raises(PartitionBusy, match=f"{day} cannot be detached while the detach of {other} is pending"):
            await retirement.detach(conn, day)
    await retirement.detach(conn, other)
    await retirement.detach(conn, day)
    assert await partitions.attached(conn) == []


@pytest.fixture
def two_phase() -> Iterator[Database]:
    """A server that accepts prepared transactions."""
    with postgres_servers.running(max_prepared_transactions="5") as dsn:
        yield Database(dsn)


async def test_a_prepared_transaction_is_named_with_the_command_that_ends_it(
    two_phase: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared transaction belongs to no session. Formerly, the message was "its lock was busy", with pid None."""
    monkeypatch.setattr(partitions, "ATTEMPTS", 1)
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 1_200)
    monkeypatch.setattr(database_checks, "MAX_FOREIGN_LOCK_S", 0)
    async with two_phase.connected(application="test") as conn, two_phase.connected(application="other") as other:
        await migrate.migrate(conn, NOW)
        name = (await partitions.ensure(conn, [DAY]))[DAY]
        await other.execute("BEGIN; LOCK TABLE device_heartbeats IN SHARE MODE; PREPARE TRANSACTION 'it''s two'")
        with pytest.raises(PartitionBusy, match=r"prepared transaction it's two .*ROLLBACK PREPARED 'it''s two'"):
            await retirement.detach(conn, name)
        result = await line(conn, "locks", tmp_path)
        assert (result.passed, "ROLLBACK PREPARED 'it''s two'" in result.remedy) == (False, True)
        await other.execute("ROLLBACK PREPARED 'it''s two'")
        assert (await line(conn, "locks", tmp_path)).passed
        await retirement.detach(conn, name)
        assert await partitions.attached(conn) == []


SPACES = """SELECT c.relname, coalesce(t.spcname, 'the default') FROM pg_class c
LEFT JOIN pg_tablespace t ON t.oid = c.reltablespace WHERE c.relname LIKE 'device\\_heartbeats\\_%'"""


@pytest.fixture
async def spaces(conn: Connection) -> AsyncIterator[None]:
    """Create two tablespaces, one of which is the default of the database."""
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
async def test_a_new_day_and_a_restored_one_use_the_tablespace_of_their_parent(house: House) -> None:
    """Formerly, the tables of days were created in default_tablespace: on a full disk instead of the one bought for
    them."""
    conn, database = house.conn, house.database
    async with database.connected(application="test", lock_timeout="2000") as own:
        await partitions.ensure(own, [NOW.date()])
        assert {row[1] for row in await conn.fetch(SPACES)} == {"the default"}
        await house.fill(OLD)
        assert (await house.nightly()).status == "completed"
        await conn.execute("ALTER TABLE device_heartbeats SET TABLESPACE large")
        await restore.restore_day(own, house.store, await catalog.find(own, OLD), NOW)
        await partitions.ensure(own, [NOW.date() + timedelta(days=20)])
    result = {row[0]: row[1] for row in await conn.fetch(SPACES)}
    for day in (OLD, NOW.date() + timedelta(days=20)):
        name = partitions.table_name(day)
        assert (result[name], result[f"{name}_key"]) == ("large", "large")
    assert result[partitions.table_name(NOW.date())] == "the default"
    async with asyncio.timeout(SOON_S), conn.transaction():
        assert len(await house.rows(OLD)) == 150
