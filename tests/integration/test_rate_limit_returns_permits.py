"""Formerly, heartbeats that nexhb itself could not commit counted towards the device's rate limit: a queue of 500, sent
as a list and refused with 503 three times, received 429 the fourth time. docs/reliability.md promises that a valid
heartbeat receives no 4xx, whatever fails. With a 503, nexhb now returns the permits to the device's rate limit."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import orjson

from nexhb.config import IngestSettings
from nexhb.postgres.connections import Database
from tests.conftest import SOON_S, StartDaemon, example


async def test_a_queue_that_cannot_be_stored_may_be_sent_any_number_of_times(
    start_daemon: StartDaemon, database: Database, now: datetime
) -> None:
    limits = IngestSettings(device_burst=500, device_per_minute=1, answer_within_seconds=1)
    nexhb = await start_daemon(ingest=limits)
    agent = await nexhb.agent()
    queue = orjson.dumps([example(now - timedelta(minutes=n), device_id=agent.device_id) for n in range(500)])
    async with database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        statuses = [(await agent.post(queue, "/v1/heartbeats")).status for _ in range(3)]
    assert statuses == [503] * 3
    async with asyncio.timeout(SOON_S):
        while (answer := await agent.post(queue, "/v1/heartbeats")).status == 503:
            await asyncio.sleep(0.2)
    assert answer.status == 200
