"""Migrations are applied once, completely and in order, and never by commands other than `serve` and `migrate`."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from nexhb import log
from nexhb.errors import DatabaseUnavailable, MigrationError
from nexhb.postgres import connections, migrate
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from nexhb.postgres.migrate import Migration
from tests.conftest import StartDaemon

NOW = datetime(2026, 11, 24, 2, tzinfo=UTC)
ONE = Migration(1, "0001_one", "CREATE TABLE one (n int);")
TWO = Migration(2, "0002_two", "CREATE TABLE two (n int); INSERT INTO one VALUES (1);")


@pytest.fixture
async def empty(empty_database: Database) -> AsyncIterator[Connection]:
    """Yield a connection to a database without nexhb's schema."""
    conn = await empty_database.connect(application="test", lock_timeout="5000")
    yield conn
    conn.terminate()


async def tables(conn: Connection) -> list[str]:
    """Return the names of the tables of the database."""
    rows = await conn.fetch("SELECT relname FROM pg_stat_user_tables ORDER BY relname")
    return [row["relname"] for row in rows]


async def journal(conn: Connection) -> list[tuple[int, str, str, datetime]]:
    """Return the recorded migrations."""
    return [tuple(row) for row in await conn.fetch("SELECT * FROM schema_migrations ORDER BY version")]


async def test_an_empty_database_gets_the_schema_and_a_second_migration_changes_nothing(empty: Connection) -> None:
    names = [migration.name for migration in migrate.find_migrations()]
    assert names[0] == "0001_initial"
    assert await migrate.migrate(empty, NOW) == names
    assert {"device_heartbeats", "device_last_status", "devices", "schema_migrations"} <= set(await tables(empty))
    before = await journal(empty)
    assert [(version, name) for version, name, *_ in before] == list(enumerate(names, 1))
    assert before[0][2:] == (migrate.find_migrations()[0].checksum, NOW)
    assert await migrate.migrate(empty, datetime.now(UTC)) == []
    assert await journal(empty) == before


async def test_a_detached_day_gets_the_columns_that_later_migrations_add(empty: Connection) -> None:
    """ALTER TABLE device_heartbeats reaches attached days only. Without the new columns, a detached day could not be
    archived."""
    first, *later = migrate.find_migrations()
    await migrate.migrate(empty, NOW, [first])
    await empty.execute(
        """CREATE TABLE device_heartbeats_20260101 (LIKE device_heartbeats);
           INSERT INTO hb_partitions (partition_name, range_start, range_end)
           VALUES ('device_heartbeats_20260101', '2026-01-01 00:00+00', '2026-01-02 00:00+00')"""
    )
    await migrate.migrate(empty, NOW, [first, *later])
    await empty.execute(
        """ALTER TABLE device_heartbeats ATTACH PARTITION device_heartbeats_20260101
           FOR VALUES FROM ('2026-01-01 00:00+00') TO ('2026-01-02 00:00+00')"""
    )


async def test_only_what_is_missing_is_applied(empty: Connection) -> None:
    assert await migrate.migrate(empty, NOW, [ONE]) == ["0001_one"]
    assert await migrate.migrate(empty, NOW, [ONE, TWO]) == ["0002_two"]
    assert await empty.fetchval("SELECT count(*) FROM one") == 1


async def test_a_migration_that_was_changed_after_it_was_applied_is_an_error_that_names_it(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE, TWO])
    changed = Migration(2, "0002_two", TWO.text + "\n")
    with pytest.raises(MigrationError, match=r"0002_two was changed .* Restore the file"):
        await migrate.migrate(empty, NOW, [ONE, changed, Migration(3, "0003_three", "CREATE TABLE three (n int)")])
    assert await tables(empty) == ["one", "schema_migrations", "two"]


async def test_an_unknown_migration_in_the_database_is_an_error_that_names_it(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE, TWO])
    with pytest.raises(MigrationError, match=r"0002_two, which this nexhb does not know"):
        await migrate.migrate(empty, NOW, [ONE])


async def test_two_concurrent_migrations_do_not_collide(empty_database: Database) -> None:
    conns = [await empty_database.connect(application="test") for _ in range(4)]
    done = await asyncio.gather(*(migrate.migrate(conn, NOW, [ONE, TWO]) for conn in conns))
    assert sorted(done) == [[], [], [], ["0001_one", "0002_two"]]
    assert len(await journal(conns[0])) == 2
    for conn in conns:
        conn.terminate()


async def test_two_concurrent_migrations_of_an_empty_database_create_one_schema(empty_database: Database) -> None:
    conns = [await empty_database.connect(application="test") for _ in range(2)]
    done = await asyncio.gather(*(migrate.migrate(conn, NOW) for conn in conns))
    assert sorted(done) == [[], [migration.name for migration in migrate.find_migrations()]]
    for conn in conns:
        conn.terminate()


async def test_a_migration_that_fails_half_way_leaves_nothing_and_can_be_fixed(empty: Connection) -> None:
    broken = Migration(2, "0002_two", "CREATE TABLE two (n int); INSERT INTO one VALUES (1); SELECT 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate.migrate(empty, NOW, [ONE, broken])
    assert await tables(empty) == ["one", "schema_migrations"]  # the first migration is applied, and stays
    assert [name for _, name, *_ in await journal(empty)] == ["0001_one"]
    assert await empty.fetchval("SELECT count(*) FROM one") == 0
    assert await migrate.migrate(empty, NOW, [ONE, TWO]) == ["0002_two"]


async def test_a_migration_and_its_record_are_committed_together(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE])
    spoils_the_journal = Migration(
        2, "0002_two", "CREATE TABLE two (n int); INSERT INTO schema_migrations VALUES (2, 'x', 'y', now());"
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await migrate.migrate(empty, NOW, [ONE, spoils_the_journal])
    assert await tables(empty) == ["one", "schema_migrations"]
    assert len(await journal(empty)) == 1


async def test_a_migration_that_fails_releases_its_lock(empty_database: Database, empty: Connection) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await migrate.migrate(empty, NOW, [Migration(1, "0001_one", "CREATE TABLE one n int)")])
    other = await empty_database.connect(application="test", lock_timeout="1000")
    assert await migrate.migrate(other, NOW, [ONE]) == ["0001_one"]
    other.terminate()


async def test_the_wait_for_another_migration_is_limited(empty_database: Database, empty: Connection) -> None:
    impatient = await empty_database.connect(application="test", lock_timeout="50")
    async with held(empty, Lock.MIGRATE, wait=False):
        with pytest.raises(asyncpg.LockNotAvailableError):
            await migrate.migrate(impatient, NOW, [ONE])
    assert await migrate.migrate(impatient, NOW, [ONE]) == ["0001_one"]
    impatient.terminate()


async def test_the_lock_of_a_table_in_use_is_requested_again_without_blocking_others(
    empty_database: Database, empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader's open transaction blocks nobody until another session waits to lock the table: then all later ones wait
    too."""
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(migrate, "PAUSE_S", 0.3)
    await migrate.migrate(empty, NOW, [ONE])
    alters = Migration(2, "0002_alters", "ALTER TABLE one ADD COLUMN more int")
    reader, writer = [await empty_database.connect(application="a report", lock_timeout="250") for _ in range(2)]
    lines = io.StringIO()
    log.setup("info", lines)
    reading = reader.transaction()
    await reading.start()
    await reader.fetch("SELECT FROM one")
    await asyncio.sleep(1.1)  # long enough for the message to name the transaction
    migrating = asyncio.create_task(migrate.migrate(empty, NOW, [ONE, alters]))
    for _ in range(20):
        await writer.execute("INSERT INTO one DEFAULT VALUES")  # LockNotAvailableError if the migration waits too long
        await asyncio.sleep(0.05)
    assert not migrating.done()
    await reading.rollback()
    assert await migrating == ["0002_alters"]
    assert f"pid {reader.get_server_pid()} (a report) has been idle in transaction for" in lines.getvalue()
    for conn in (reader, writer):
        conn.terminate()


async def test_a_table_that_stays_locked_is_an_error_that_names_the_transaction(
    empty_database: Database, empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_MS", 50)
    monkeypatch.setattr(migrate, "ATTEMPTS", 3)
    monkeypatch.setattr(migrate, "PAUSE_S", 0.5)
    await migrate.migrate(empty, NOW, [ONE])
    alters = Migration(2, "0002_alters", "ALTER TABLE one ADD COLUMN more int")
    other = await empty_database.connect(application="a report", lock_timeout="250")
    async with other.transaction():
        await other.fetch("SELECT FROM one")
        with pytest.raises(MigrationError, match=r"0002_alters could not lock a table: pid \d+ \(a report\)"):
            await migrate.migrate(empty, NOW, [ONE, alters])
    assert await migrate.migrate(empty, NOW, [ONE, alters]) == ["0002_alters"]
    other.terminate()


async def test_a_postgresql_that_is_too_old_is_refused(empty: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MINIMUM_VERSION", 990_000)
    with pytest.raises(DatabaseUnavailable, match="needs version 14 or newer"):
        await migrate.migrate(empty, NOW, [ONE])
    assert await tables(empty) == []


async def test_a_daemon_does_not_start_on_a_schema_it_does_not_know(
    start_daemon: StartDaemon, conn: Connection
) -> None:
    await conn.execute("INSERT INTO schema_migrations VALUES (9999, '9999_of_tomorrow', 'x', now())")
    with pytest.raises(MigrationError, match="9999_of_tomorrow"):
        await start_daemon()
    await conn.execute("DELETE FROM schema_migrations WHERE version = 9999")
    await start_daemon()


# ---- the files --------------------------------------------------------------------------------------------------


def write(folder: Path, *names: str) -> Path:
    """Create a folder with these files."""
    for name in names:
        (folder / name).write_text(f"SELECT '{name}'")
    return folder


def test_migrations_are_listed_in_order(tmp_path: Path) -> None:
    listed = migrate.find_migrations(write(tmp_path, "0002_b.sql", "0001_a.sql", "0003_c_2.sql", "README.md"))
    assert [(m.version, m.name) for m in listed] == [(1, "0001_a"), (2, "0002_b"), (3, "0003_c_2")]
    assert [m.text for m in listed] == [f"SELECT '{m.name}.sql'" for m in listed]
    assert len({m.checksum for m in listed}) == 3


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["0001_a.sql", "0003_c.sql"], "0003_c.sql"),
        (["0002_b.sql"], "0002_b.sql"),
        (["0001_a.sql", "0001_b.sql"], "0001_b.sql"),
        (["0001_a.sql", "2_b.sql"], "2_b.sql"),
        (["0001_a.sql", "0002_B.sql"], "0002_B.sql"),
        (["0001_a.sql", "0002.sql"], "0002.sql"),
        (["0000_a.sql"], "0000_a.sql"),
    ],
)
def test_a_gap_in_the_numbers_or_a_wrong_file_name_is_an_error(tmp_path: Path, names: list[str], named: str) -> None:
    with pytest.raises(MigrationError) as caught:
        migrate.find_migrations(write(tmp_path, *names))
    assert caught.value.detail.startswith(f"{named}:")
