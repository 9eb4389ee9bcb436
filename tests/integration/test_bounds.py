"""Limits of the daemon's memory and of durations, and how long old rows are kept, on a real database."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg
import pytest

from nexhb.devices import store as device_store
from nexhb.devices import tokens
from nexhb.errors import DatabaseUnavailable, LockLost
from nexhb.heartbeat import Label
from nexhb.ingest import labels as labels_module
from nexhb.ingest.labels import Labels
from nexhb.jobs import nightly
from nexhb.jobs.nightly import NightlyRun
from nexhb.nexmdm import adoption as nexmdm_adoption
from nexhb.nexmdm.adoption import Adoption, TokenStatus, _Candidate
from nexhb.postgres import connections, locks, migrate
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from tests.support.nightly import NOW, House


async def test_labels_in_memory_are_limited_in_number_and_keep_their_numbers(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "MAX_LABELS", 5)
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
    """Before an irreversible step, this very connection must hold the lock; that some connection holds it is not
    enough."""
    async with database.connected(application="another") as other, held(other, Lock.NIGHTLY, wait=False):
        await locks.check(other, Lock.NIGHTLY)
        for one, lock in ((conn, Lock.NIGHTLY), (other, Lock.RECONCILE)):
            with pytest.raises(LockLost):
                await locks.check(one, lock)
    async with held(conn, Lock.NIGHTLY, wait=False):
        await locks.check(conn, Lock.NIGHTLY)
    with pytest.raises(LockLost):
        await locks.check(conn, Lock.NIGHTLY)


async def test_an_old_postgresql_is_rejected_before_anything_is_created(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    monkeypatch.setattr(connections, "MINIMUM_VERSION", 990000)
    async with empty_database.connected(application="test") as conn:
        with pytest.raises(DatabaseUnavailable, match="14 or newer"):
            await migrate.migrate(conn, now)
        assert await conn.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'schema_migrations'") == 0


async def test_a_read_that_takes_too_long_is_ended_by_the_server(database: Database) -> None:
    """After a timeout of the client alone, the statement would keep running on the server, on the fleet's two cores."""
    pool = await database.pool(application="slow reads", size=1, timeout_s=0.2)
    async with pool.acquire() as reader:
        with pytest.raises(asyncpg.QueryCanceledError):
            await reader.execute("SELECT pg_sleep(60)")
    pool.terminate()


# ---- tokens that wait to be adopted ----------------------------------------------------------------------------------


@pytest.fixture
def adoption(database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch) -> Adoption:
    """Return an adoption in which no token ever matches a hash, and which does not pause between checks."""
    monkeypatch.setattr(nexmdm_adoption, "PAUSE_FACTOR", 0)
    monkeypatch.setattr(nexmdm_adoption, "PAUSE_FACTOR_UNHINTED", 0)
    return Adoption(database, lambda: now, check=lambda _token, _hashed: False)


async def test_the_memory_for_unknown_tokens_is_limited(
    adoption: Adoption, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "MAX_MISSES", 4)
    monkeypatch.setattr(nexmdm_adoption, "MAX_REJECTED", 4)
    strangers = [f"stranger-{number}" for number in range(9)]
    for token in strangers:
        assert await adoption.status(token, tokens.hash_token(token)) is TokenStatus.UNKNOWN
    assert len(adoption._unknown) == 4
    for token in strangers:
        await adoption._check_all(_Candidate(token.encode(), tokens.hash_token(token), None))
    assert len(adoption._rejected) == 4
    await adoption.close()


# ---- what a nightly run deletes --------------------------------------------------------------------------------------


async def test_the_nightly_run_deletes_old_rows_and_keeps_the_others(house: House) -> None:
    """The nightly run deletes old rows of runs, changes of flags and comparisons, and the spool files of a run that was
    killed."""
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
    async with house.context().store() as store, held(house.conn, Lock.NIGHTLY, wait=True):
        assert (await NightlyRun(house.conn, store, house.context(), NOW).run()).failures == ()
    for table, moment in (
        ("job_runs", "started_at"),
        ("feature_flag_changes", "changed_at"),
        ("perf_diff_comparisons", "compared_at"),
    ):
        [row] = await house.conn.fetch(f"SELECT {moment} AS at FROM {table}")
        assert row["at"] > NOW - nightly.RUNS_KEPT, table
    assert {path.name for path in spool.iterdir()} == {"somebody-elses"}
