"""The schema comes up to date: once, whole, in order, and never behind anybody's back."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from nexhb import db, log, migrate
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable, MigrationError
from nexhb.locks import Lock, held
from nexhb.migrate import Migration
from tests.conftest import StartDaemon

NOW = datetime(2026, 11, 24, 2, tzinfo=UTC)
ONE = Migration(1, "0001_one", "CREATE TABLE one (n int);")
TWO = Migration(2, "0002_two", "CREATE TABLE two (n int); INSERT INTO one VALUES (1);")


@pytest.fixture
async def empty(empty_database: Database) -> AsyncIterator[Connection]:
    """A connection to a database without a schema."""
    conn = await empty_database.connect(application="test", lock_timeout="5000")
    yield conn
    conn.terminate()


async def tables(conn: Connection) -> list[str]:
    """What stands in the database."""
    rows = await conn.fetch("SELECT relname FROM pg_stat_user_tables ORDER BY relname")
    return [row["relname"] for row in rows]


async def journal(conn: Connection) -> list[tuple[int, str, str, datetime]]:
    """What is written of the migrations."""
    return [tuple(row) for row in await conn.fetch("SELECT * FROM schema_migrations ORDER BY version")]


async def test_an_empty_database_gets_the_schema_and_a_second_time_changes_nothing(empty: Connection) -> None:
    names = [migration.name for migration in migrate.find()]
    assert names[0] == "0001_initial"
    assert await migrate.migrate(empty, NOW) == names
    assert {"device_heartbeats", "device_last_status", "devices", "schema_migrations"} <= set(await tables(empty))
    before = await journal(empty)
    assert [(version, name) for version, name, *_ in before] == list(enumerate(names, 1))
    assert before[0][2:] == (migrate.find()[0].checksum, NOW)
    assert await migrate.migrate(empty, datetime.now(UTC)) == []
    assert await journal(empty) == before


async def test_only_what_is_missing_is_applied(empty: Connection) -> None:
    assert await migrate.migrate(empty, NOW, [ONE]) == ["0001_one"]
    assert await migrate.migrate(empty, NOW, [ONE, TWO]) == ["0002_two"]
    assert await empty.fetchval("SELECT count(*) FROM one") == 1


async def test_a_file_that_was_changed_after_it_had_been_applied_is_named(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE, TWO])
    changed = Migration(2, "0002_two", TWO.text + "\n")
    with pytest.raises(MigrationError, match=r"0002_two was changed .* Restore the file"):
        await migrate.migrate(empty, NOW, [ONE, changed, Migration(3, "0003_three", "CREATE TABLE three (n int)")])
    assert await tables(empty) == ["one", "schema_migrations", "two"]


async def test_a_migration_that_this_nexhb_does_not_know_is_named(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE, TWO])
    with pytest.raises(MigrationError, match=r"0002_two, which this nexhb does not know"):
        await migrate.migrate(empty, NOW, [ONE])


async def test_two_at_once_do_not_collide(empty_database: Database) -> None:
    conns = [await empty_database.connect(application="test") for _ in range(4)]
    done = await asyncio.gather(*(migrate.migrate(conn, NOW, [ONE, TWO]) for conn in conns))
    assert sorted(done) == [[], [], [], ["0001_one", "0002_two"]]
    assert len(await journal(conns[0])) == 2
    for conn in conns:
        conn.terminate()


async def test_two_at_once_on_an_empty_database_come_to_one_schema(empty_database: Database) -> None:
    conns = [await empty_database.connect(application="test") for _ in range(2)]
    done = await asyncio.gather(*(migrate.migrate(conn, NOW) for conn in conns))
    assert sorted(done) == [[], [migration.name for migration in migrate.find()]]
    for conn in conns:
        conn.terminate()


async def test_one_that_fails_half_way_leaves_nothing_and_can_be_mended(empty: Connection) -> None:
    broken = Migration(2, "0002_two", "CREATE TABLE two (n int); INSERT INTO one VALUES (1); SELECT 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate.migrate(empty, NOW, [ONE, broken])
    assert await tables(empty) == ["one", "schema_migrations"]  # the first is in, and stays
    assert [name for _, name, *_ in await journal(empty)] == ["0001_one"]
    assert await empty.fetchval("SELECT count(*) FROM one") == 0
    assert await migrate.migrate(empty, NOW, [ONE, TWO]) == ["0002_two"]


async def test_a_migration_and_its_line_in_the_journal_go_in_together(empty: Connection) -> None:
    await migrate.migrate(empty, NOW, [ONE])
    spoils_the_journal = Migration(
        2, "0002_two", "CREATE TABLE two (n int); INSERT INTO schema_migrations VALUES (2, 'x', 'y', now());"
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await migrate.migrate(empty, NOW, [ONE, spoils_the_journal])
    assert await tables(empty) == ["one", "schema_migrations"]
    assert len(await journal(empty)) == 1


async def test_one_that_fails_gives_its_lock_back(empty_database: Database, empty: Connection) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await migrate.migrate(empty, NOW, [Migration(1, "0001_one", "CREATE TABLE one n int)")])
    other = await empty_database.connect(application="test", lock_timeout="1000")
    assert await migrate.migrate(other, NOW, [ONE]) == ["0001_one"]
    other.terminate()


async def test_the_wait_for_somebody_elses_migration_has_an_end(empty_database: Database, empty: Connection) -> None:
    impatient = await empty_database.connect(application="test", lock_timeout="50")
    async with held(empty, Lock.MIGRATE, wait=False):
        with pytest.raises(asyncpg.LockNotAvailableError):
            await migrate.migrate(impatient, NOW, [ONE])
    assert await migrate.migrate(impatient, NOW, [ONE]) == ["0001_one"]
    impatient.terminate()


async def test_a_table_that_somebody_reads_is_asked_for_again_and_holds_nobody_up(
    empty_database: Database, empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader's open transaction blocks nobody, until somebody waits for the whole table: then everybody behind."""
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
    await asyncio.sleep(1.1)  # long enough to be somebody's whom one can name
    migrating = asyncio.create_task(migrate.migrate(empty, NOW, [ONE, alters]))
    for _ in range(20):
        await writer.execute("INSERT INTO one DEFAULT VALUES")  # LockNotAvailableError where it waits for long
        await asyncio.sleep(0.05)
    assert not migrating.done()
    await reading.rollback()
    assert await migrating == ["0002_alters"]
    assert f"pid {reader.get_server_pid()} (a report) is idle in transaction" in lines.getvalue()
    for conn in (reader, writer):
        conn.terminate()


async def test_a_table_that_stays_locked_is_an_error_that_names_the_holder(
    empty_database: Database, empty: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_MS", 50)
    monkeypatch.setattr(migrate, "TRIES", 3)
    monkeypatch.setattr(migrate, "PAUSE_S", 0.5)
    await migrate.migrate(empty, NOW, [ONE])
    alters = Migration(2, "0002_alters", "ALTER TABLE one ADD COLUMN more int")
    other = await empty_database.connect(application="a report", lock_timeout="250")
    async with other.transaction():
        await other.fetch("SELECT FROM one")
        with pytest.raises(MigrationError, match=r"0002_alters finds a table locked: pid \d+ \(a report\)"):
            await migrate.migrate(empty, NOW, [ONE, alters])
    assert await migrate.migrate(empty, NOW, [ONE, alters]) == ["0002_alters"]
    other.terminate()


async def test_a_postgresql_too_old_is_told_so(empty: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "MINIMUM_VERSION", 990_000)
    with pytest.raises(DatabaseUnavailable, match="needs 14 or newer"):
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
    """A folder with these files."""
    for name in names:
        (folder / name).write_text(f"SELECT '{name}'")
    return folder


def test_files_are_found_in_their_order(tmp_path: Path) -> None:
    found = migrate.find(write(tmp_path, "0002_b.sql", "0001_a.sql", "0003_c_2.sql", "README.md"))
    assert [(m.version, m.name) for m in found] == [(1, "0001_a"), (2, "0002_b"), (3, "0003_c_2")]
    assert [m.text for m in found] == [f"SELECT '{m.name}.sql'" for m in found]
    assert len({m.checksum for m in found}) == 3


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
def test_a_gap_in_the_numbers_or_a_file_named_otherwise_is_named(tmp_path: Path, names: list[str], named: str) -> None:
    with pytest.raises(MigrationError) as caught:
        migrate.find(write(tmp_path, *names))
    assert caught.value.detail.startswith(f"{named}:")
