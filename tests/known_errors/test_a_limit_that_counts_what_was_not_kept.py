"""A device's allowance was spent by heartbeats that nexhb itself could not commit: a queue of 500, sent as a list and
refused with 503 three times, met 429 the fourth time. docs/reliability.md promises that a good heartbeat hears no 4xx,
whatever is broken. What is answered 503 is given back."""

from __future__ import annotations

from datetime import datetime, timedelta

import orjson

from nexhb.config import Ingest
from tests.conftest import StartDaemon, example


async def test_a_queue_that_could_not_be_kept_may_come_again_and_again(
    start_daemon: StartDaemon, now: datetime
) -> None:
    # More than the queue takes: the list is refused behind its first hundred, each time.
    nexhb = await start_daemon(ingest=Ingest(device_burst=500, device_per_minute=1, queue_items=100))
    agent = await nexhb.agent()
    queue = orjson.dumps([example(now - timedelta(minutes=n), device_id=agent.device_id) for n in range(500)])
    statuses = [(await agent.post(queue, "/v1/heartbeats")).status for _ in range(4)]
    assert statuses == [503] * 4
    assert (await agent.send(now)).status == 200
