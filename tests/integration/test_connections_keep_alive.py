"""Formerly, a connection that used only the fast path was closed at the end of its keep-alive, 150 s after its last
response, although the next heartbeat had arrived and waited to be committed: aiohttp considers such a connection idle.
In a fleet that sends every 150 s, every heartbeat that was committed late was sent twice."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from nexhb.http import server
from tests.conftest import SOON_S, StartDaemon
from tests.support.raw_connection import connect, post


async def test_an_idle_timeout_does_not_close_a_connection_that_awaits_a_response(
    start_daemon: StartDaemon, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEEPALIVE_S", 1.0)
    nexhb = await start_daemon()
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    async with nexhb.database.connected(application="test") as conn, connect(nexhb) as connection:
        assert (await connection.ask(post(agent, now)))[0] == 200
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            connection.writer.write(post(agent, now + timedelta(seconds=20)))
            await asyncio.sleep(1.5)
        assert (await connection.answer())[0] == 200
        assert (await connection.ask(post(agent, now + timedelta(seconds=40))))[0] == 200
        async with asyncio.timeout(SOON_S):
            assert await connection.reader.read() == b"", "closed once no response is due"
