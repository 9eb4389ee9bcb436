"""A refusal waits for up to 5 s. Formerly, it did so even after its client had disconnected: clients that connected,
sent a request and disconnected 9,000 times per second, without any key, used 560 MB of a daemon whose intake was
closed. The wait now ends with the connection."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import datetime

import pytest

from nexhb.config import IngestSettings
from nexhb.http.device_api import backpressure
from nexhb.postgres.connections import Connection
from tests.conftest import SOON_S, StartDaemon
from tests.support.hostile import HEAD, connect

LINES = 30


async def test_the_wait_for_a_refusal_ends_when_the_client_disconnects(
    start_daemon: StartDaemon, now: datetime, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backpressure, "REFUSALS_PER_S", 1)
    monkeypatch.setattr(backpressure, "REFUSALS_AT_ONCE", 1)
    monkeypatch.setattr(backpressure, "REFUSAL_WITHIN_S", 50.0)
    nexhb = await start_daemon(ingest=IngestSettings(queue_items=1, answer_within_seconds=25))
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        held = asyncio.create_task(agent.send(now))
        while await nexhb.metric("nexhb_intake_items") < 1:
            pass
        before = len(asyncio.all_tasks())
        async with AsyncExitStack() as stack:
            for _ in range(LINES):
                _, writer = await stack.enter_async_context(connect(nexhb))
                writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
            while len(asyncio.all_tasks()) < before + 2 * LINES - 4:  # the task of each connection, and its handler
                await nexhb.metric("nexhb_intake_items")
        async with asyncio.timeout(SOON_S):
            while len(asyncio.all_tasks()) > before + 2:
                await nexhb.metric("nexhb_intake_items")
    assert (await held).status == 200
