"""With more connections than the queue takes, each back the moment it was refused, refusals took the event loop: every
round trip of the writer waited for thousands of them, and of 9,000 commits a second 2,000 were left. Refusals are paced
now, and who waits for one sends nothing. `python -m bench overload` found it."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from nexhb.config import Ingest
from nexhb.db import Connection
from nexhb.http import pace
from tests.conftest import StartDaemon


async def test_refusals_are_answered_so_many_a_second(
    start_daemon: StartDaemon, now: datetime, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "REFUSALS_PER_S", 20)
    monkeypatch.setattr(pace, "REFUSALS_AT_ONCE", 2)
    nexhb = await start_daemon(ingest=Ingest(queue_items=1))
    first, other = await nexhb.agent(), await nexhb.agent()
    loop = asyncio.get_running_loop()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        held = asyncio.create_task(first.send(now))
        while await nexhb.metric("nexhb_intake_items") < 1:
            pass
        began = loop.time()
        answers = await asyncio.gather(*(other.send(now) for _ in range(12)))
        assert loop.time() - began > 0.45  # ten of them 50 ms apart
    assert {answer.status for answer in answers} == {503}
    assert (await held).status == 200
