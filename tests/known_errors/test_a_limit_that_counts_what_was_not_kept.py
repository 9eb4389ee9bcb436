"""A device's allowance was spent by heartbeats that nexhb itself could not commit: a queue of 500, sent as a list and
refused with 503 three times, met 429 the fourth time. docs/reliability.md promises that a good heartbeat hears no 4xx,
whatever is broken. What is answered 503 is given back."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import orjson

from nexhb.config import Ingest
from nexhb.db import Database
from tests.conftest import SOON_S, StartDaemon, example


async def test_a_queue_that_could_not_be_kept_may_come_again_and_again(
    start_daemon: StartDaemon, database: Database, now: datetime
) -> None:
    limits = Ingest(device_burst=500, device_per_minute=1, answer_within_seconds=1)
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
