"""With a synchronous standby, a 2xx means that the standby has the row, even if the wait for the standby ends early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest

from nexhb.config import ReadsSettings
from nexhb.devices import enrolment, registry
from nexhb.errors import NotConfirmed
from nexhb.ingest import writer as writer_module
from nexhb.postgres import migrate
from nexhb.postgres.connections import Connection, Database
from nexhb.reading import flags
from tests.conftest import SOON_S, Answer, Nexhb, StartDaemon
from tests.faults.cluster import Cluster, running
from tests.faults.guard import Guard, guarding
from tests.standby import Standby, standby_of

WAITS = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb writer' AND wait_event = 'SyncRep'"
    " AND query LIKE $1"
)
CANCEL = (
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'test change' AND wait_event = 'SyncRep'"
)


NOBODY = "nobody"  # a standby that does not exist, so that each COMMIT waits


@pytest.fixture
def guard() -> Any:
    """Provide a guard that removes the files and processes that a test leaves."""
    with guarding() as guard:
        yield guard


@pytest.fixture
async def primary(guard: Guard) -> AsyncIterator[Cluster]:
    """Start a cluster for the test alone, which may change its settings."""
    async with running(guard) as cluster:
        yield cluster


async def names(cluster: Cluster, standbys: str) -> None:
    """Set synchronous_standby_names, and wait until the setting is in effect."""
    conn = await asyncpg.connect(cluster.dsn)
    await conn.execute("SET synchronous_commit = local")
    await conn.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
    await conn.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(SOON_S):
        while await conn.fetchval("SHOW synchronous_standby_names") != standbys:
            await asyncio.sleep(0.01)
        # The checkpointer lets commits wait, perhaps later than a session shows the setting.
        await conn.execute("SET synchronous_commit = on")
        while standbys == NOBODY and await has_committed(conn):
            pass
    conn.terminate()


async def has_committed(conn: asyncpg.Connection) -> bool:
    """Return whether a transaction ends within 0.2 s, without waiting for a standby."""
    try:
        await conn.execute("SELECT pg_logical_emit_message(true, 'test', '')", timeout=0.2)
    except TimeoutError:
        return False
    return True


@pytest.fixture
async def lagging(primary: Cluster, now: datetime) -> AsyncIterator[Database]:
    """Yield a database with a device, in which each COMMIT waits for a standby that is not connected."""
    database = Database(primary.dsn)
    async with database.connected(application="test") as conn:
        await migrate.migrate(conn, now)
        await registry.add(conn, "kiosk-1", None)
    await names(primary, NOBODY)
    yield database
    await names(primary, "")


async def waiting(nexhb: Nexhb, statement: str) -> int:
    """Return the pid of the writer's backend once it waits for a standby in this statement."""
    async with asyncio.timeout(SOON_S):
        while not (backends := await nexhb.rows(WAITS, statement)):
            await asyncio.sleep(0.01)
    return int(backends[0]["pid"])


async def held_off(nexhb: Nexhb, sent: asyncio.Task[Answer], trouble: str) -> Answer:
    """Cancel or terminate every backend that waits for a standby, repeatedly, until the response arrives; return it."""
    async with asyncio.timeout(60):
        while not sent.done():
            for row in await nexhb.rows(WAITS, "%"):
                await nexhb.rows(f"SELECT {trouble}($1)", row["pid"])
            await asyncio.sleep(0.05)
    return await sent


async def on(standby: Standby) -> int:
    """Return the number of heartbeats on the standby."""
    conn = await asyncpg.connect(standby.dsn)
    try:
        return int(await conn.fetchval("SELECT count(*) FROM device_heartbeats"))
    finally:
        conn.terminate()


async def test_a_commit_that_the_standby_does_not_have_is_not_acknowledged(
    primary: Cluster, guard: Guard, start_daemon: StartDaemon, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the wait of a COMMIT for a synchronous standby is cancelled, PostgreSQL reports success with a WARNING; if the
    backend is terminated, pg_xact_status is "committed". Formerly, the heartbeat received 200 in both cases, although
    the standby had no row."""
    monkeypatch.setattr(writer_module, "RETRY_FOR_S", 1.0)
    async with standby_of(primary, guard) as standby:
        await names(primary, standby.name)
        nexhb: Nexhb = replace(await start_daemon(url=primary.dsn), database=Database(primary.dsn))
        agent = await nexhb.agent()
        assert (await agent.send(now)).status == 200  # creates the label
        for minute, trouble in enumerate(("pg_cancel_backend", "pg_terminate_backend"), 1):
            await standby.stop()
            made_at = now - timedelta(minutes=minute)
            sent = asyncio.create_task(agent.send(made_at))
            await waiting(nexhb, "COMMIT%")
            assert (await held_off(nexhb, sent, trouble)).status == 503, trouble
            # Each commit would be on the primary alone, so the daemon is not ready until the standby is back.
            await waiting(nexhb, "%pg_logical_emit_message%")
            assert (await nexhb.get("/readyz", 503))["reasons"]
            await standby.start()
            again = await agent.retry(made_at)
            assert again.body["deduplicated"] is True
            assert await on(standby) == minute + 1
        await names(primary, "")  # with a name, the cleanup would wait for a standby that no longer exists


async def test_a_commit_in_doubt_counts_once_the_standby_confirms(
    primary: Cluster, start_daemon: StartDaemon, now: datetime
) -> None:
    """The backend is terminated while COMMIT waits, and the standby returns: the committed heartbeat is acknowledged
    once."""
    nexhb: Nexhb = replace(await start_daemon(url=primary.dsn), database=Database(primary.dsn))
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200  # creates the label
    await names(primary, NOBODY)
    sent = asyncio.create_task(agent.send(now))
    await nexhb.rows("SELECT pg_terminate_backend($1)", await waiting(nexhb, "COMMIT%"))
    await waiting(nexhb, "%pg_logical_emit_message%")  # the writer checks that the standby has it, before it responds
    assert not sent.done()
    await names(primary, "")
    answer = await sent
    assert (answer.status, answer.body["deduplicated"]) == (200, False)
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda conn, now: registry.add(conn, "kiosk-2", None),
        lambda conn, now: registry.rotate(conn, "kiosk-1"),
        lambda conn, now: registry.revoke(conn, "kiosk-1", now),
        lambda conn, now: enrolment.issue_enrolment_key(conn, note=None, uses=1, expires_at=now),
        lambda conn, now: flags.change(conn, {"perf_diff": True}, "test", now, flags.first_values(ReadsSettings())),
    ],
    ids=["add", "rotate", "revoke", "enrolment key", "flags"],
)
async def test_a_change_that_no_standby_has_is_reported_as_unconfirmed(
    lagging: Database, now: datetime, change: Callable[[Connection, datetime], Awaitable[object]]
) -> None:
    """Formerly, a failover could lose a token that had been printed: the device received 401."""
    async with lagging.connected(application="test change") as conn, lagging.connected(application="test") as other:
        changed = asyncio.ensure_future(change(conn, now))
        while not changed.done():
            await other.execute(CANCEL)
            await asyncio.sleep(0.02)
        with pytest.raises(NotConfirmed):
            await changed
