"""Formerly, with more connections than the queue accepts, each of which retried as soon as it was refused, the refusals
used up the event loop. Every round trip of the writer waited for thousands of refusals, and commits fell from 9,000 to
2,000 heartbeats per second. Refusals are paced now, and a client that waits for one sends nothing. `python -m bench
overload` found this."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from nexhb.config import IngestSettings
from nexhb.http.device_api import backpressure
from nexhb.postgres.connections import Connection
from tests.conftest import StartDaemon


async def test_refusals_are_limited_to_a_number_per_second(
    start_daemon: StartDaemon, now: datetime, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backpressure, "REFUSALS_PER_S", 20)
    monkeypatch.setattr(backpressure, "REFUSALS_AT_ONCE", 2)
    nexhb = await start_daemon(ingest=IngestSettings(queue_items=1))
    first, other = await nexhb.agent(), await nexhb.agent()
    loop = asyncio.get_running_loop()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        held = asyncio.create_task(first.send(now))
        while await nexhb.metric("nexhb_intake_items") < 1:
            pass
        began = loop.time()
        answers = await asyncio.gather(*(other.send(now) for _ in range(12)))
        assert loop.time() - began > 0.45  # ten refusals, 50 ms apart
    assert {answer.status for answer in answers} == {503}
    assert (await held).status == 200
