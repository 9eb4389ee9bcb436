"""A connection that only ever went around aiohttp was closed at the end of its keep-alive, 150 s after its last answer,
though the next heartbeat had come and waited to be committed: to aiohttp such a connection is idle. A fleet with that
interval had every heartbeat committed late sent twice."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from nexhb import daemon
from tests.conftest import SOON_S, StartDaemon
from tests.integration.test_express import line_to, post


async def test_the_keepalive_does_not_end_while_an_answer_is_due(
    start_daemon: StartDaemon, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "KEEPALIVE_S", 1.0)
    nexhb = await start_daemon()
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    async with nexhb.database.connected(application="test") as conn, line_to(nexhb) as line:
        assert (await line.ask(post(agent, now)))[0] == 200
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            line.writer.write(post(agent, now + timedelta(seconds=20)))
            await asyncio.sleep(1.5)
        assert (await line.answer())[0] == 200
        assert (await line.ask(post(agent, now + timedelta(seconds=40))))[0] == 200
        async with asyncio.timeout(SOON_S):
            assert await line.reader.read() == b"", "and closed when nothing is due any more"
