"""A 2xx with a synchronous standby: the row is on the standby too, whatever happens to the wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest

from nexhb import devices, flags, migrate
from nexhb import writer as writer_module
from nexhb.config import Reads
from nexhb.db import Connection, Database
from nexhb.errors import NotConfirmed
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


@pytest.fixture
def guard() -> Any:
    """Clears away what a test leaves."""
    with guarding() as guard:
        yield guard


@pytest.fixture
async def primary(guard: Guard) -> AsyncIterator[Cluster]:
    """A cluster of the test's own, whose settings it may change."""
    async with running(guard) as cluster:
        yield cluster


async def names(cluster: Cluster, standbys: str) -> None:
    """Set synchronous_standby_names, and wait until it is in force."""
    conn = await asyncpg.connect(cluster.dsn)
    await conn.execute("SET synchronous_commit = local")
    await conn.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
    await conn.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(SOON_S):
        while await conn.fetchval("SHOW synchronous_standby_names") != standbys:
            await asyncio.sleep(0.01)
    conn.terminate()


@pytest.fixture
async def lagging(primary: Cluster, now: datetime) -> AsyncIterator[Database]:
    """A database with a device, in which each COMMIT waits for a standby that is not there."""
    database = Database(primary.dsn)
    async with database.connected(application="test") as conn:
        await migrate.migrate(conn, now)
        await devices.add(conn, "kiosk-1", None)
    await names(primary, "nobody")
    yield database
    await names(primary, "")


async def waiting(nexhb: Nexhb, statement: str) -> int:
    """The backend of the writer, once it waits for a standby with this statement."""
    async with asyncio.timeout(SOON_S):
        while not (found := await nexhb.rows(WAITS, statement)):
            await asyncio.sleep(0.01)
    return int(found[0]["pid"])


async def held_off(nexhb: Nexhb, sent: asyncio.Task[Answer], trouble: str) -> Answer:
    """The answer, while whatever waits for a standby is cancelled or terminated again and again."""
    async with asyncio.timeout(60):
        while not sent.done():
            for row in await nexhb.rows(WAITS, "%"):
                await nexhb.rows(f"SELECT {trouble}($1)", row["pid"])
            await asyncio.sleep(0.05)
    return await sent


async def on(standby: Standby) -> int:
    """How many heartbeats it has."""
    conn = await asyncpg.connect(standby.dsn)
    try:
        return int(await conn.fetchval("SELECT count(*) FROM device_heartbeats"))
    finally:
        conn.terminate()


async def test_a_commit_that_the_standby_does_not_have_is_not_acknowledged(
    primary: Cluster, guard: Guard, start_daemon: StartDaemon, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COMMIT waited for a synchronous standby and the wait was cancelled: PostgreSQL says success with a WARNING. Or
    its backend was terminated: pg_xact_status says "committed". Both were answered 200, and the standby had no row."""
    monkeypatch.setattr(writer_module, "RETRY_FOR_S", 1.0)
    async with standby_of(primary, guard) as standby:
        await names(primary, standby.name)
        nexhb: Nexhb = replace(await start_daemon(url=primary.dsn), database=Database(primary.dsn))
        agent = await nexhb.agent()
        assert (await agent.send(now)).status == 200  # it brings the label
        for minute, trouble in enumerate(("pg_cancel_backend", "pg_terminate_backend"), 1):
            await standby.stop()
            made_at = now - timedelta(minutes=minute)
            sent = asyncio.create_task(agent.send(made_at))
            await waiting(nexhb, "COMMIT%")
            assert (await held_off(nexhb, sent, trouble)).status == 503, trouble
            # Each commit would be on the primary alone: the daemon is not ready until the standby is there again.
            await waiting(nexhb, "%pg_logical_emit_message%")
            assert (await nexhb.get("/readyz", 503))["reasons"]
            await standby.start()
            async with asyncio.timeout(SOON_S):
                while (again := await agent.send(made_at)).status != 200:
                    await asyncio.sleep(0.05)
            assert again.body["deduplicated"] is True
            assert await on(standby) == minute + 1
        await names(primary, "")  # else what is left waits for a standby that is gone


async def test_a_commit_in_doubt_counts_once_the_standby_confirms(
    primary: Cluster, start_daemon: StartDaemon, now: datetime
) -> None:
    """The backend is gone while COMMIT waits; the standby is there again: what is committed is acknowledged, once."""
    nexhb: Nexhb = replace(await start_daemon(url=primary.dsn), database=Database(primary.dsn))
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200  # it brings the label
    await names(primary, "nobody")
    sent = asyncio.create_task(agent.send(now))
    await nexhb.rows("SELECT pg_terminate_backend($1)", await waiting(nexhb, "COMMIT%"))
    await waiting(nexhb, "%pg_logical_emit_message%")  # it is asked whether the standby has it, before the answer
    assert not sent.done()
    await names(primary, "")
    answer = await sent
    assert (answer.status, answer.body["deduplicated"]) == (200, False)
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda conn, now: devices.add(conn, "kiosk-2", None),
        lambda conn, now: devices.rotate(conn, "kiosk-1"),
        lambda conn, now: devices.revoke(conn, "kiosk-1", now),
        lambda conn, now: devices.issue_enrolment_key(conn, note=None, uses=1, expires_at=now),
        lambda conn, now: flags.change(conn, {"perf_diff": True}, "test", now, flags.first_values(Reads())),
    ],
    ids=["add", "rotate", "revoke", "enrolment key", "flags"],
)
async def test_a_change_that_no_standby_has_is_said_to_be_unconfirmed(
    lagging: Database, now: datetime, change: Callable[[Connection, datetime], Awaitable[object]]
) -> None:
    """A token was printed, and a failover lost it: the device heard 401."""
    async with lagging.connected(application="test change") as conn, lagging.connected(application="test") as other:
        changed = asyncio.ensure_future(change(conn, now))
        while not changed.done():
            await other.execute(CANCEL)
            await asyncio.sleep(0.02)
        with pytest.raises(NotConfirmed):
            await changed
