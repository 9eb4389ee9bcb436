"""The writer retries, splits a batch with a bad row, and settles every heartbeat, also if it fails or stops."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

import pytest

from nexhb.config import IngestSettings
from nexhb.postgres.connections import Connection
from tests.conftest import SOON_S, Answer, Nexhb, StartDaemon


async def test_only_the_row_that_the_database_rejects_is_rejected(nexhb: Nexhb, now: datetime) -> None:
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    agents = [await nexhb.agent() for _ in range(30)]
    answers = await asyncio.gather(
        *(
            agent.send(now, battery={"pct": 66.0 if number in (7, 8, 20) else 50.0})
            for number, agent in enumerate(agents)
        )
    )
    assert [number for number, answer in enumerate(answers) if answer.status != 200] == [7, 8, 20]
    assert answers[7].status == 422
    assert "odd" in answers[7].body["errors"][0]["message"]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 27
    assert len(await nexhb.rows("SELECT FROM device_last_status")) == 27


@pytest.mark.usefixtures("patient")
async def test_the_first_attempt_counts_towards_the_retry_time(start_daemon: StartDaemon, now: datetime) -> None:
    """If a lock outlasts the first attempt, the device receives 503 at once, not after a second attempt."""
    nexhb = await start_daemon()
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(minutes=1))).status == 200
    before = await nexhb.metric("nexhb_write_retries_total")
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        assert (await agent.send(now)).status == 503
        assert await nexhb.metric("nexhb_write_retries_total") == before
    assert (await agent.retry(now)).status == 200


async def test_an_unexpected_error_is_503_and_reported_by_readyz_until_it_ends(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    # The trigger raises an error that the classifier does not know: 42883, undefined function.
    break_it = """CREATE FUNCTION breaks() RETURNS trigger LANGUAGE plpgsql AS
                  $$ BEGIN PERFORM no_such_function(); RETURN NEW; END $$;
                  CREATE TRIGGER breaks BEFORE INSERT ON device_last_status FOR EACH ROW EXECUTE FUNCTION breaks()"""
    await conn.execute(break_it)
    for minute in range(3):
        assert (await agent.send(now - timedelta(minutes=minute))).status == 503
    assert "failed unexpectedly" in str(await nexhb.get("/readyz", 503))
    await conn.execute("DROP TRIGGER breaks ON device_last_status")
    assert (await agent.send(now)).status == 200  # heartbeats were still admitted
    assert await nexhb.get("/readyz") == {"ready": True, "reasons": []}


async def test_a_full_queue_is_503_before_the_body_is_read(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(queue_items=3))
    agents = [await nexhb.agent() for _ in range(6)]
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agent.send(now)) for agent in agents]
        refused: set[asyncio.Task[Answer]] = set()
        while len(refused) < 3:
            refused, _ = await asyncio.wait(sends, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status for task in refused] == [503] * 3
        assert all("Retry-After" in task.result().headers for task in refused)
    answers = await asyncio.gather(*sends)
    assert sorted(answer.status for answer in answers) == [200] * 3 + [503] * 3


async def test_a_heartbeat_that_cannot_be_committed_in_time_is_503(
    start_daemon: StartDaemon, now: datetime, conn: Connection, patient: None
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(answer_within_seconds=1))
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        answer = await agent.send(now)
    assert answer.status == 503
    assert (await agent.retry(now)).status == 200


async def test_admitted_heartbeats_are_committed_when_the_daemon_stops(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    from nexhb import daemon as daemon_module  # noqa: PLC0415

    nexhb = await start_daemon()
    agents = [await nexhb.agent() for _ in range(10)]
    async with daemon_module.running(nexhb.settings) as second:
        for agent in agents:
            agent.nexhb.url = second.url
        locked = conn.transaction()
        await locked.start()
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agent.send(now)) for agent in agents]
        while await nexhb.metric("nexhb_intake_items") < 10:
            pass
        asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(locked.commit()))
    answers = await asyncio.gather(*sends)
    assert [answer.status for answer in answers] == [200] * 10
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 10


async def test_the_wait_for_the_writer_is_measured_once_per_batch(
    nexhb: Nexhb, now: datetime, conn: Connection
) -> None:
    agents = [await nexhb.agent() for _ in range(4)]
    assert (await agents[0].send(now - timedelta(minutes=1))).status == 200
    count, waited = [await nexhb.metric(f"nexhb_queue_wait_seconds_{what}") for what in ("count", "sum")]
    loop = asyncio.get_running_loop()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sends = [asyncio.create_task(agents[0].send(now))]
        while await nexhb.metric("nexhb_queue_wait_seconds_count") == count:
            pass
        sends += [asyncio.create_task(agent.send(now)) for agent in agents[1:]]
        while await nexhb.metric("nexhb_intake_items") < 4:
            pass
        since = loop.time()
        while loop.time() - since < 0.3:
            await nexhb.metric("nexhb_intake_items")
    assert [answer.status for answer in await asyncio.gather(*sends)] == [200] * 4
    assert await nexhb.metric("nexhb_queue_wait_seconds_count") - count == 2
    assert await nexhb.metric("nexhb_queue_wait_seconds_sum") - waited > 0.3


async def test_a_blocked_event_loop_is_measured(nexhb: Nexhb) -> None:
    lagged = await nexhb.metric("nexhb_loop_lag_seconds_sum")
    time.sleep(1.0)  # noqa: ASYNC251 - the daemon's sweeper sleeps for half of it, on the same loop
    async with asyncio.timeout(SOON_S):
        while await nexhb.metric("nexhb_loop_lag_seconds_sum") - lagged < 0.4:
            pass
