"""A refusal waits for its turn for up to 5 s, and did so for clients that were gone as well: who connected, asked and
went away 9,000 times a second, without any key, took 560 MB of a daemon whose intake was closed. The wait ends with
the connection now."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import datetime

import pytest

from nexhb.config import Ingest
from nexhb.db import Connection
from nexhb.http import pace
from tests.conftest import StartDaemon
from tests.integration.test_hostile_clients import HEAD, line_to

LINES = 30


async def test_who_is_gone_waits_for_no_refusal(
    start_daemon: StartDaemon, now: datetime, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "REFUSALS_PER_S", 1)
    monkeypatch.setattr(pace, "REFUSALS_AT_ONCE", 1)
    monkeypatch.setattr(pace, "REFUSAL_WITHIN_S", 50.0)
    nexhb = await start_daemon(ingest=Ingest(queue_items=1, answer_within_seconds=25))
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        held = asyncio.create_task(agent.send(now))
        while await nexhb.metric("nexhb_intake_items") < 1:
            pass
        before = len(asyncio.all_tasks())
        async with AsyncExitStack() as stack:
            for _ in range(LINES):
                _, writer = await stack.enter_async_context(line_to(nexhb))
                writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
            while len(asyncio.all_tasks()) < before + 2 * LINES - 4:  # each line's own task, and its handler
                await nexhb.metric("nexhb_intake_items")
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > before + 2:
                await nexhb.metric("nexhb_intake_items")
    assert (await held).status == 200
