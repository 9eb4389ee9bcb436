"""A daemon that stops finishes the requests in progress. Formerly, aiohttp discarded the bytes of their bodies that
arrived after the stop had begun: a stop during a request took the whole timeout of the body, 10 s, and the request
received 408. In a rollout, this affected every queue that was being sent."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from nexhb import config, daemon
from tests.conftest import Nexhb
from tests.support.raw_connection import AROUND, connect, post


@pytest.mark.parametrize("extra", [b"", AROUND])
async def test_a_body_that_arrives_while_the_daemon_stops_is_read(nexhb: Nexhb, now: datetime, extra: bytes) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    settings = nexhb.settings.model_copy(update={"server": config.ServerSettings(port=0, shutdown_timeout_seconds=30)})
    request = post(agent, now, extra)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        running = await stack.enter_async_context(daemon.running(settings))
        async with connect(replace(nexhb, url=running.url)) as connection:
            connection.writer.write(request[:-100])
            await asyncio.sleep(0.5)  # longer than HOLD_S, so that the handler waits for the rest
            stopping = tasks.create_task(stack.aclose())
            await asyncio.sleep(0.2)
            assert not stopping.done()
            status, _, body = await connection.ask(request[-100:])
            assert status == 200, body
            assert await connection.reader.read() == b""
