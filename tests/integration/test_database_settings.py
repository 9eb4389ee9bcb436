"""The settings on which durability depends are checked at the start and while the daemon runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime

import asyncpg
import pytest
from pydantic import SecretStr

from nexhb import config, preparation
from nexhb.postgres import connections
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S, StartDaemon


@pytest.fixture
async def fsync_off(conn: Connection) -> AsyncIterator[None]:
    """Turn fsync off for the test."""
    await set_fsync(conn, "off")
    yield
    await set_fsync(conn, "on")


async def set_fsync(conn: Connection, value: str) -> None:
    """Set fsync, and wait until the setting is in effect."""
    await conn.execute(f"ALTER SYSTEM SET fsync = {value}")
    await conn.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(SOON_S):
        while await conn.fetchval("SHOW fsync") != value:
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("fsync_off")
async def test_fsync_off_makes_a_daemon_not_ready_until_it_is_on(
    start_daemon: StartDaemon, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SETTINGS_S", 0.05)
    nexhb = await start_daemon()
    reasons = (await nexhb.get("/readyz", 503))["reasons"]
    assert "fsync is off" in reasons[0]
    assert "ALTER SYSTEM SET fsync = on" in reasons[0]
    agent = await nexhb.agent()
    refused = await agent.send(now)
    assert (refused.status, "fsync is off" in refused.body["detail"]) == (503, True)
    assert int(refused.headers["Retry-After"]) >= 2
    await set_fsync(conn, "on")
    async with asyncio.timeout(SOON_S):
        while (await (await nexhb.http.get(f"{nexhb.url}/readyz")).json())["reasons"]:
            await asyncio.sleep(0.02)
    assert (await agent.retry(now)).status == 200


@pytest.mark.usefixtures("fsync_off")
async def test_a_daemon_that_accepts_unsafe_settings_is_ready(start_daemon: StartDaemon, database: Database) -> None:
    accepting = config.DatabaseSettings(url=SecretStr(database.dsn), accept_unsafe_settings=True)
    nexhb = await start_daemon(database=accepting)
    assert (await nexhb.get("/readyz"))["ready"]


async def test_a_safe_database_has_no_hazards(conn: Connection) -> None:
    assert await connections.unsafe_settings(conn) == []


async def test_a_pooler_that_drops_the_sessions_settings_is_detected(database: Database) -> None:
    bare = await asyncpg.connect(database.dsn)  # like a connection through a pooler that drops startup parameters
    try:
        [hazard] = await connections.unsafe_settings(bare)
        assert "pooler" in hazard.detail
        assert "connect directly" in hazard.remedy
    finally:
        await bare.close()


async def test_an_override_of_the_sessions_settings_is_detected(conn: Connection) -> None:
    await conn.execute("SET synchronous_commit = off")
    [hazard] = await connections.unsafe_settings(conn)
    assert "synchronous_commit off" in hazard.detail


async def test_a_roles_own_default_does_not_weaken_a_session(database: Database, conn: Connection) -> None:
    name = await conn.fetchval("SELECT current_database()")
    await conn.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    await conn.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'")
    fresh = await database.connect(application="test")
    try:
        assert await connections.unsafe_settings(fresh) == []
    finally:
        await fresh.close()
