"""Formerly, a queue that exceeded its device's rate received 429 in the middle, with a Retry-After for the refused
block only. The client also sends the earlier blocks again, and these used up the permits that had become available
during the wait: a client that waited for Retry-After never got its queue accepted. The wait now covers the whole queue
that was read."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import orjson

from nexhb.config import IngestSettings
from tests.conftest import StartDaemon, example


async def test_the_whole_queue_is_stored_after_the_wait_in_retry_after(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=500, device_per_minute=12_000))
    agent = await nexhb.agent()
    queue = orjson.dumps([example(now - timedelta(minutes=n), device_id=agent.device_id) for n in range(500)])
    assert (await agent.post(queue, "/v1/heartbeats")).status == 200
    statuses = []
    for _ in range(3):  # at most two refusals, one for each of the queue's two blocks, and then a success
        answer = await agent.post(queue, "/v1/heartbeats")
        statuses.append(answer.status)
        if answer.status == 200:
            break
        await asyncio.sleep(int(answer.headers["Retry-After"]))
    assert statuses[0] == 429
    assert statuses[-1] == 200
