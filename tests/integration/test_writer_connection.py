"""The writer's connection is lost, or hangs: no heartbeat is lost, devices receive 503 until the database can commit
again, and what was learned on one connection is not believed on the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import date, datetime, timedelta

import asyncpg
import pytest
from pydantic import SecretStr

from nexhb.config import DatabaseSettings
from nexhb.devices import tokens
from nexhb.errors import DayMissing
from nexhb.ingest.connection import Session, WriterConnection
from nexhb.postgres import connections
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.identity import DatabaseTracker
from nexhb.readiness import Readiness
from tests.conftest import SOON_S, Nexhb, StartDaemon
from tests.proxy import CommitFault, Proxy
from tests.support.heartbeats import LABEL


async def test_a_terminated_backend_loses_no_heartbeat(nexhb: Nexhb, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(20)]
    terminated, stop = 0, asyncio.Event()

    async def nemesis() -> None:
        nonlocal terminated
        pause_s = 0.03  # grows each time, because a slow machine could otherwise never connect
        while not stop.is_set():
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, 1.0)
            rows = await nexhb.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb writer'"
            )
            terminated += len(rows)

    trouble = asyncio.create_task(nemesis())
    minute = 0
    while terminated < 5:
        minute += 1
        answers = await asyncio.gather(*(agent.send(now - timedelta(minutes=minute)) for agent in agents))
        assert {answer.status for answer in answers} <= {200, 503}
        for agent, answer in zip(agents, answers, strict=True):
            if answer.status != 200:
                assert (await agent.retry(now - timedelta(minutes=minute))).status == 200
    stop.set()
    await trouble
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 20 * minute


async def test_a_commit_that_hangs_times_out_and_is_retried(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, patient: None
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    await agent.send(now - timedelta(minutes=1))
    proxy.commit_fault = CommitFault.HANG
    assert (await agent.retry(now)).status == 200
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2


async def test_devices_receive_503_while_the_database_is_unreachable_and_200_afterwards(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime, patient: None
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200
    proxy.make_unreachable()
    answer = await agent.send(now)
    assert answer.status == 503
    assert 2 <= int(answer.headers["Retry-After"]) <= 12
    async with nexhb.http.get(f"{nexhb.url}/readyz") as response:
        assert response.status == 503
        assert "commit" in (await response.json())["reasons"][0]
    # This token is not in memory: a daemon that could not look it up must not return 401.
    agent.token = tokens.new_token()
    assert (await agent.send(now)).status == 503
    proxy.make_reachable()
    async with asyncio.timeout(SOON_S):
        while True:
            async with nexhb.http.get(f"{nexhb.url}/readyz") as response:
                if response.status == 200:
                    break
    assert (await (await nexhb.agent()).send(now)).status == 200


async def test_an_unknown_token_is_503_while_the_token_store_cannot_be_read(
    start_daemon: StartDaemon, proxy: Proxy, now: datetime
) -> None:
    nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
    agent = await nexhb.agent()
    agent.token = tokens.new_token()
    assert (await agent.send(now)).status == 401
    agent.token = tokens.new_token()
    proxy.make_unreachable()
    assert (await agent.send(now)).status == 503


async def test_a_connection_whose_set_up_failed_is_not_used(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, if a new connection of the writer stalled during its setup, the writer used it although the setup was
    incomplete: the connection expected addresses in another format than the writer sent. Every heartbeat with an
    address, which means every heartbeat, was refused with 422 until the connection was lost."""
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
        agent = await nexhb.agent()
        packed = connections.use_packed
        stalled: list[Connection] = []

        async def stalls_once(conn: Connection) -> None:
            if not stalled:
                stalled.append(conn)
                raise TimeoutError
            await packed(conn)

        monkeypatch.setattr(connections, "use_packed", stalls_once)
        proxy.commit_fault = CommitFault.CUT_BEFORE
        while (await agent.send(now)).status != 200:  # 503 if the writer was idle and noticed the stall
            pass
        assert stalled[0].is_closed()


# ---- what was learned on a connection --------------------------------------------------------------------------------


@pytest.fixture
def tracker() -> DatabaseTracker:
    """Return a tracker that knows no database yet."""
    return DatabaseTracker()


@pytest.fixture
def lost() -> asyncio.Event:
    """Return the event that is set when a connection ends."""
    return asyncio.Event()


@pytest.fixture
async def connection(
    database: Database, tracker: DatabaseTracker, lost: asyncio.Event
) -> AsyncIterator[WriterConnection]:
    """Yield a writer's connection that has a session which has learned something."""
    connection = WriterConnection(database, Readiness(), tracker, on_lost=lost.set)
    session = await connection.session()
    session.recent.add([1])
    session.tables[date(2026, 11, 24)] = "device_heartbeats_20261124"
    await session.labels.learn(session.conn, [LABEL])
    yield connection
    connection.close()


async def knows_nothing(connection: WriterConnection, before: Session) -> bool:
    """Return whether the connection has a new session, which knows nothing."""
    session = await connection.session()
    return session is not before and not (1 in session.recent or session.tables or session.labels.numbers)


async def test_a_session_lasts_as_long_as_its_connection(connection: WriterConnection) -> None:
    session = await connection.session()
    assert await connection.session() is session
    connection.reset_after(asyncpg.DeadlockDetectedError("odd"))
    assert await connection.session() is session
    assert 1 in session.recent
    assert session.tables
    assert session.labels[LABEL]


async def test_what_was_learned_ends_with_a_lost_connection(connection: WriterConnection, lost: asyncio.Event) -> None:
    session = await connection.session()
    session.conn.terminate()
    async with asyncio.timeout(SOON_S):
        await lost.wait()
    assert await knows_nothing(connection, session)


@pytest.mark.parametrize(
    "error", [asyncpg.ConnectionDoesNotExistError("lost"), KeyError("a bug"), asyncpg.UndefinedTableError("unfit")]
)
async def test_what_was_learned_ends_with_an_error_that_makes_the_connection_suspect(
    connection: WriterConnection, error: Exception
) -> None:
    session = await connection.session()
    connection.reset_after(error)
    assert session.conn.is_closed()
    assert await knows_nothing(connection, session)


async def test_a_missing_table_of_a_day_makes_only_the_tables_forgotten(connection: WriterConnection) -> None:
    session = await connection.session()
    connection.reset_after(DayMissing("device_heartbeats_20261124."))
    assert await connection.session() is session
    assert (session.tables, 1 in session.recent) == ({}, True)


async def test_what_was_learned_ends_when_another_connection_reaches_another_database(
    connection: WriterConnection, tracker: DatabaseTracker, conn: Connection
) -> None:
    session = await connection.session()
    await tracker.check(conn)
    assert not session.conn.is_closed()
    tracker.note_devices([(99, "kiosk-99")])  # this database lacks the device, so it is an older copy
    await tracker.check(conn)
    assert tracker.older_copy
    assert session.conn.is_closed()
    assert await knows_nothing(connection, session)
