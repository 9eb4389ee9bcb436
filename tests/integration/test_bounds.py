"""What is bounded in the daemon's memory and in time, by how much of it there is, on a real database."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg
import pytest

from nexhb import db, devices, locks, migrate, staging
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable, LockLost
from nexhb.jobs import nightly
from nexhb.jobs.nightly import Night
from nexhb.legacy import adopt
from nexhb.legacy.adopt import Adoption, Standing, _Asked
from nexhb.locks import Lock, held
from nexhb.staging import Labels
from nexhb.wire import Label
from tests.integration.test_nightly import NOW, House, house

__all__ = ["house"]  # a fixture


async def test_labels_in_memory_are_no_more_than_the_bound_and_keep_their_numbers(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LABELS_HELD", 5)
    every = [Label("1.0", "", "wifi", f"shop {number}") for number in range(12)]
    labels = Labels()
    numbers: dict[Label, int] = {}
    for first in range(0, 12, 3):
        some = every[first : first + 3]
        await labels.learn(conn, some)
        assert len(labels.numbers) <= 5
        numbers |= {label: labels[label] for label in some}
    assert len(set(numbers.values())) == 12
    await labels.learn(conn, every[:2])
    assert [labels[label] for label in every[:2]] == [numbers[label] for label in every[:2]]


async def test_a_lock_is_held_by_the_connection_that_took_it_and_by_no_other(
    database: Database, conn: Connection
) -> None:
    """Before a step that cannot be taken back: that somebody holds it is not enough."""
    async with database.connected(application="another") as other, held(other, Lock.NIGHTLY, wait=False):
        await locks.check(other, Lock.NIGHTLY)
        for one, lock in ((conn, Lock.NIGHTLY), (other, Lock.RECONCILE)):
            with pytest.raises(LockLost):
                await locks.check(one, lock)
    async with held(conn, Lock.NIGHTLY, wait=False):
        await locks.check(conn, Lock.NIGHTLY)
    with pytest.raises(LockLost):
        await locks.check(conn, Lock.NIGHTLY)


async def test_an_old_postgresql_is_refused_before_anything_is_made(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    monkeypatch.setattr(db, "MINIMUM_VERSION", 990000)
    async with empty_database.connected(application="test") as conn:
        with pytest.raises(DatabaseUnavailable, match="14 or newer"):
            await migrate.migrate(conn, now)
        assert await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'schema_migrations'") == 0


async def test_a_read_that_takes_too_long_is_ended_by_the_server(database: Database) -> None:
    """The client's own bound leaves the statement running there, on the fleet's two cores."""
    pool = await database.pool(application="slow reads", size=1, timeout_s=0.2)
    async with pool.acquire() as reader:
        with pytest.raises(asyncpg.QueryCanceledError):
            await reader.execute("SELECT pg_sleep(60)")
    pool.terminate()


# ---- who waits to be adopted -----------------------------------------------------------------------------------------


@pytest.fixture
def adoption(database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch) -> Adoption:
    """One for whom no hash ever fits, without its pauses."""
    monkeypatch.setattr(adopt, "PAUSE", 0)
    monkeypatch.setattr(adopt, "PAUSE_UNHINTED", 0)
    return Adoption(database, lambda: now, check=lambda _token, _hashed: False)


async def test_tokens_that_are_nobodys_are_remembered_within_a_bound(
    adoption: Adoption, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MISSES_HELD", 4)
    monkeypatch.setattr(adopt, "REFUSED_HELD", 4)
    strangers = [f"stranger-{number}" for number in range(9)]
    for token in strangers:
        assert await adoption.standing(token, devices.hash_token(token)) is Standing.NOBODYS
    assert len(adoption._nobodys) == 4
    for token in strangers:
        await adoption._try_all(_Asked(token.encode(), devices.hash_token(token), None))
    assert len(adoption._refused) == 4
    await adoption.close()


# ---- what a night clears away ----------------------------------------------------------------------------------------


async def test_a_night_forgets_what_is_old_and_keeps_the_rest(house: House) -> None:
    """Rows of runs, of changed flags and of comparisons; and the spool files of a run that was killed."""
    spool = house.folder / "spool"
    spool.mkdir()
    (spool / "object-left").touch()
    (spool / "somebody-elses").touch()
    second = timedelta(seconds=1)
    for at in (NOW - nightly.RUNS_KEPT - second, NOW - nightly.RUNS_KEPT + second):
        await house.conn.execute(
            "INSERT INTO job_runs (job, started_at, status, host) VALUES ('reconcile', $1, 'completed', 'h')", at
        )
        await house.conn.execute(
            """INSERT INTO feature_flag_changes (flag, value_to, changed_at, changed_by)
               VALUES ('perf_diff', 'true', $1, 'a')""",
            at,
        )
    for at in (NOW - nightly.COMPARISONS_KEPT - second, NOW - nightly.COMPARISONS_KEPT + second):
        await house.conn.execute(
            """INSERT INTO perf_diff_comparisons
                   (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows, rows_differ, examples, host)
               VALUES ('offline', $1, 1, 1, 1, 1, 0, '{}', 'h')""",
            at,
        )
    async with house.means().store() as store, held(house.conn, Lock.NIGHTLY, wait=True):
        assert (await Night(house.conn, store, house.means(), NOW).run()).failures == ()
    for table, moment in (
        ("job_runs", "started_at"),
        ("feature_flag_changes", "changed_at"),
        ("perf_diff_comparisons", "compared_at"),
    ):
        [row] = await house.conn.fetch(f"SELECT {moment} AS at FROM {table}")
        assert row["at"] > NOW - nightly.RUNS_KEPT, table
    assert {path.name for path in spool.iterdir()} == {"somebody-elses"}
