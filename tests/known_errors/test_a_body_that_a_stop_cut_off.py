"""A daemon that stops finishes the requests under way, but aiohttp threw away what came of their bodies from then on.
So each stop in mid-request took the body's whole timeout, 10 s, and ended it with a 408: in a rollout, with every
queue that was being sent."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from nexhb import config, daemon
from tests.conftest import Nexhb
from tests.integration.test_express import AROUND, line_to, post


@pytest.mark.parametrize("extra", [b"", AROUND])
async def test_a_body_that_comes_while_the_daemon_stops_is_read(nexhb: Nexhb, now: datetime, extra: bytes) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    settings = nexhb.settings.model_copy(update={"server": config.Server(port=0, shutdown_timeout_seconds=30)})
    request = post(agent, now, extra)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        running = await stack.enter_async_context(daemon.running(settings))
        async with line_to(replace(nexhb, url=running.url)) as line:
            line.writer.write(request[:-100])
            await asyncio.sleep(0.5)  # over HOLD_S: its handler waits for the rest
            stopping = tasks.create_task(stack.aclose())
            await asyncio.sleep(0.2)
            assert not stopping.done()
            status, _, body = await line.ask(request[-100:])
            assert status == 200, body
            assert await line.reader.read() == b""
