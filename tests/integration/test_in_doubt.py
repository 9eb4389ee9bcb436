"""A COMMIT without a response: its outcome is looked up, so that no heartbeat is lost and none is called a duplicate of
itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest
from pydantic import SecretStr

from nexhb import partitions
from nexhb.config import DatabaseSettings
from nexhb.ingest import in_doubt
from nexhb.ingest.connection import Session
from nexhb.ingest.in_doubt import Doubt
from nexhb.ingest.intake import WRITTEN
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S, Nexhb, StartDaemon, example
from tests.faults.cluster import Cluster, running, until_up
from tests.faults.guard import guarding
from tests.proxy import CommitFault, Proxy
from tests.support.heartbeats import beat


@pytest.mark.parametrize(
    ("fault", "outcome"), [(CommitFault.LOSE_RESPONSE, "committed"), (CommitFault.CUT_BEFORE, "aborted")]
)
async def test_the_outcome_of_a_commit_in_doubt_is_looked_up(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, fault: CommitFault, outcome: str
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    name = f'nexhb_commits_in_doubt_total{{outcome="{outcome}"}}'
    before = await nexhb.metric(name)
    proxy.commit_fault = fault
    answer = await agent.send(now)
    assert proxy.fault_applied.is_set()
    # The heartbeat is written once, and is not "deduplicated" against its own first attempt.
    assert (answer.status, answer.body["deduplicated"]) == (200, False)
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 1
    assert await nexhb.metric(name) == before + 1


@pytest.mark.usefixtures("patient")
async def test_a_commit_in_doubt_is_discarded_with_its_batch(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime
) -> None:
    """Formerly, if the next batch had the same length, it was mistaken for the batch in doubt: a lost heartbeat
    received 200."""
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agents = [await nexhb.agent() for _ in range(2)]
    for agent in agents:
        assert (await agent.send(now - timedelta(minutes=1))).status == 200
    proxy.commit_fault, proxy.refusing = CommitFault.LOSE_RESPONSE, True
    assert (await agents[0].send(now)).status == 503
    assert proxy.fault_applied.is_set()
    proxy.make_reachable()
    assert (await agents[1].retry(now)).status == 200
    rows = await nexhb.rows("SELECT device_id FROM heartbeat_history WHERE ts = $1 ORDER BY 1", now)
    assert [row["device_id"] for row in rows] == [agent.device_id for agent in agents]


@pytest.mark.parametrize("stored", [True, False])
async def test_a_committed_transaction_id_counts_only_if_a_row_of_the_transaction_is_stored(
    conn: Connection, now: datetime, stored: bool
) -> None:
    """After a crash of PostgreSQL, another transaction may get the id of the transaction that was in doubt."""
    await partitions.ensure(conn, [now.date()])
    heartbeat = beat(ts=now)
    async with conn.transaction():
        xid = await conn.fetchval("SELECT pg_current_xact_id()::text")
        if stored:
            columns = "(ts, received_at, device_no, bucket, label_no, clock_wrong)"
            values = (heartbeat.ts, heartbeat.received_at, heartbeat.device_no, heartbeat.bucket)
            await conn.execute(f"INSERT INTO device_heartbeats {columns} VALUES ($1, $2, $3, $4, 1, false)", *values)
    session = Session(conn)
    doubt = Doubt(xid, (WRITTEN,), frozenset({1}), heartbeat, "the connection is gone")
    assert await in_doubt.resolve(session, doubt) == ([WRITTEN] if stored else None)
    assert (1 in session.recent) is stored


async def test_a_witness_matches_only_the_same_arrival_of_a_heartbeat(conn: Connection, now: datetime) -> None:
    """After a crash, the id of the transaction in doubt may be used again for a transaction of another daemon, which
    may have written the same heartbeat."""
    await partitions.ensure(conn, [now.date()])
    late = now - timedelta(days=3)
    for table, at, bucket, more in (
        ("device_heartbeats", now, 10, ""),
        ("late_heartbeats", late, 20, ", reason"),
    ):
        values = "$1, $1, 1, $2, 1, false" + (", 'dropped'" if more else "")
        columns = f"(ts, received_at, device_no, bucket, label_no, clock_wrong{more})"
        await conn.execute(f"INSERT INTO {table} {columns} VALUES ({values})", at, bucket)
    is_stored = sql.queries("writer")["is_stored"]
    second = timedelta(seconds=1)
    for bucket, at in ((10, now), (20, late)):
        assert await conn.fetchval(is_stored, 1, bucket, at, at)
        for other in ((2, bucket, at, at), (1, 30, at, at), (1, bucket, at + second, at), (1, bucket, at, at + second)):
            assert not await conn.fetchval(is_stored, *other), other


async def test_a_commit_in_doubt_is_resolved_although_a_day_of_its_batch_cannot_be_created(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, if a day of a batch could not be created, and the COMMIT of the rest of the batch received no response,
    the lookup of the outcome returned a verdict for each heartbeat of the rest and none for the heartbeats of that day.
    Because of this difference in number the writer failed, and the daemon with it, in the middle of operation."""
    missing = now - timedelta(days=6)
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
        ensure = partitions.ensure

        async def busy(conn: Connection, days: list[date]) -> Any:
            if missing.date() in days:
                raise asyncpg.LockNotAvailableError
            return await ensure(conn, days)

        monkeypatch.setattr(partitions, "ensure", busy)
        agent = await nexhb.agent()
        proxy.commit_fault = CommitFault.LOSE_RESPONSE
        both = orjson.dumps([example(missing), example(now)])
        assert (await agent.post(both, "/v1/heartbeats")).status == 503
        assert proxy.fault_applied.is_set()
        assert not nexhb.running.tasks.failed.done()
        again = await agent.send(now)
        assert (again.status, again.body["deduplicated"]) == (200, True)


# The transaction's status while the backend has not noticed yet that its client has disconnected.
IN_PROGRESS = "SELECT 'in progress' WHERE $1::text IS NOT NULL"


@pytest.mark.parametrize("fault", [CommitFault.LOSE_RESPONSE, CommitFault.CUT_BEFORE])
async def test_the_outcome_of_a_transaction_in_progress_is_looked_up_again(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch, fault: CommitFault
) -> None:
    """Formerly, if a COMMIT received no response and its transaction was still in progress on the next connection, the
    exception for the doubt was raised again before a variable was bound. The device received 503 "internal error"
    instead of the 200 of the retry."""
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(url=proxy.dsn)
        agent = await nexhb.agent()
        name = 'nexhb_commits_in_doubt_total{outcome="in progress"}'
        before = await nexhb.metric(name)
        right = in_doubt._Q
        monkeypatch.setattr(in_doubt, "_Q", {**right, "xact_status": IN_PROGRESS})
        proxy.commit_fault = fault
        sent = asyncio.create_task(agent.send(now))
        async with asyncio.timeout(SOON_S):
            while await nexhb.metric(name) < before + 2:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(in_doubt, "_Q", right)
        answer = await sent
        assert (answer.status, answer.body["deduplicated"]) == (200, False)
        assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 1


@pytest.fixture
async def own_cluster() -> AsyncIterator[Cluster]:
    """Start a cluster that the test may crash."""
    with guarding() as guard:
        async with running(guard) as cluster:
            yield cluster


async def crash_before_commit(proxy: Proxy, cluster: Cluster) -> None:
    """Drop the COMMIT, and crash PostgreSQL before anything of the transaction is on disk."""
    proxy.commit_fault = CommitFault.CUT_BEFORE
    await proxy.fault_applied.wait()
    cluster.kill()
    proxy.make_unreachable()
    async with asyncio.timeout(SOON_S):
        await cluster.wait_for_restart(1)
    await until_up(cluster, 10)


@pytest.mark.parametrize("others", [0, 100])
async def test_a_commit_in_doubt_is_distinguished_from_another_transaction_with_its_id(
    start_daemon: StartDaemon, own_cluster: Cluster, now: datetime, others: int
) -> None:
    """If PostgreSQL crashes during a COMMIT, it forgets the id of that transaction, of which nothing is on disk.
    Formerly, the id was then in the future for PostgreSQL, and a valid heartbeat was refused with 422 (`make faults`
    found this); or another transaction got the id and committed, and a heartbeat that was not stored was
    acknowledged."""
    database = Database(own_cluster.dsn)
    async with Proxy(own_cluster.dsn).serving() as proxy:
        nexhb: Nexhb = replace(await start_daemon(url=proxy.dsn), database=database)
        agent = await nexhb.agent()
        crash = asyncio.create_task(crash_before_commit(proxy, own_cluster))
        await asyncio.sleep(0)
        sent = asyncio.create_task(agent.send(now))
        await crash
        for _ in range(others):
            await nexhb.rows("SELECT pg_current_xact_id()")
        proxy.make_reachable()
        answer = await sent
        while answer.status == 503:  # a timeout on a slow machine: the heartbeat is sent again, and stored once
            answer = await agent.send(now)
        assert (answer.status, len(await nexhb.rows("SELECT FROM device_heartbeats"))) == (200, 1)
