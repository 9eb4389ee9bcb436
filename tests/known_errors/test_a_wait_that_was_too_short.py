"""A queue that was too much for its device's rate heard 429 in the middle, and Retry-After for the block that was not
taken. Those before it come again too, and took what the wait had brought: a client that waited as it was told never got
its queue through. The wait is for all of it, as far as it was read."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import orjson

from nexhb.config import Ingest
from tests.conftest import StartDaemon, example


async def test_who_waits_as_told_gets_the_whole_queue_through(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(ingest=Ingest(device_burst=500, device_per_minute=12_000))
    agent = await nexhb.agent()
    queue = orjson.dumps([example(now - timedelta(minutes=n), device_id=agent.device_id) for n in range(500)])
    assert (await agent.post(queue, "/v1/heartbeats")).status == 200
    statuses = []
    for _ in range(3):  # one for each of its two blocks, and one that brings it in
        answer = await agent.post(queue, "/v1/heartbeats")
        statuses.append(answer.status)
        if answer.status == 200:
            break
        await asyncio.sleep(int(answer.headers["Retry-After"]))
    assert statuses[0] == 429
    assert statuses[-1] == 200
