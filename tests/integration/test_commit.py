"""One plan is one transaction: its rows, statuses, labels and days, beside other batches and other daemons."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from nexhb import partitions
from nexhb.config import IngestSettings
from tests.conftest import Answer, Nexhb, StartDaemon, shown


async def test_a_batch_may_span_midnight_and_days(nexhb: Nexhb, now: datetime) -> None:
    midnight = partitions.midnight(now.date())
    moments = [midnight + timedelta(days=days, seconds=seconds) for days in (-3, -1, 0) for seconds in (-1, 0)]
    agents = [await nexhb.agent() for _ in moments]
    answers = await asyncio.gather(*(agent.send(at) for agent, at in zip(agents, moments, strict=True)))
    assert [answer.status for answer in answers] == [200] * len(moments)
    rows = await nexhb.rows("SELECT tableoid::regclass::text AS day, ts FROM device_heartbeats ORDER BY ts")
    assert [(row["day"], row["ts"]) for row in rows] == [
        (partitions.table_name(moment.date()), moment) for moment in sorted(moments)
    ]


async def test_a_heartbeat_that_another_daemon_wrote_is_a_duplicate(start_daemon: StartDaemon, now: datetime) -> None:
    first, second = await start_daemon(), await start_daemon()
    agent = await first.agent()
    assert (await agent.send(now)).body["deduplicated"] is False
    before = await first.metric("nexhb_staging_batches_total")
    agent.nexhb = second
    new_agent = await second.agent("another")
    answers = await asyncio.gather(agent.send(now), new_agent.send(now))
    assert [answer.body["deduplicated"] for answer in answers] == [True, False]
    assert await first.metric("nexhb_staging_batches_total") > before
    assert len(await first.rows("SELECT FROM device_heartbeats")) == 2


async def test_a_heartbeat_that_this_daemon_wrote_is_a_duplicate_without_a_query(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    before = await nexhb.metric("nexhb_staging_batches_total")
    assert [(await agent.send(now)).body["deduplicated"] for _ in range(2)] == [False, True]
    assert await nexhb.metric("nexhb_staging_batches_total") == before


async def test_two_daemons_at_once_write_each_bucket_once(start_daemon: StartDaemon, now: datetime) -> None:
    daemons = [await start_daemon(), await start_daemon()]
    agents = [await daemons[0].agent() for _ in range(12)]

    async def replay(nexhb: Nexhb, number: int) -> list[bool]:
        agent = type(agents[0])(nexhb, agents[number].device_id, agents[number].token)
        deduplicated = []
        for minute in range(20):
            answer = await agent.send(now - timedelta(minutes=minute))
            assert answer.status == 200
            deduplicated.append(answer.body["deduplicated"])
        return deduplicated

    results = await asyncio.gather(*(replay(nexhb, number) for number in range(12) for nexhb in daemons))
    assert sum(not deduplicated for result in results for deduplicated in result) == 240
    assert len(await daemons[0].rows("SELECT FROM device_heartbeats")) == 240


async def test_the_status_is_that_of_the_newest_heartbeat_whatever_their_order(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    minutes = [5, 1, 9, 3, 0, 7, 2]
    await asyncio.gather(
        *(agent.send(now - timedelta(minutes=minute), battery={"pct": float(minute)}) for minute in minutes)
    )
    status = await nexhb.get(f"/v1/devices/{agent.device_id}")
    assert (status["last_ts"], status["battery_pct"]) == (shown(now), 0)


async def test_no_transaction_is_left_open_after_consecutive_batches(start_daemon: StartDaemon, now: datetime) -> None:
    """If another batch waits, its transaction begins together with the previous batch's COMMIT."""
    nexhb = await start_daemon(ingest=IngestSettings(batch_max=1))
    agents = [await nexhb.agent() for _ in range(20)]
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending = [asyncio.create_task(agent.send(now)) for agent in agents]
        while await nexhb.metric("nexhb_intake_items") < 20:
            await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200] * 20
    query = "SELECT state, query FROM pg_stat_activity WHERE application_name = 'nexhb writer'"
    assert [tuple(row) for row in await nexhb.rows(query)] == [("idle", "COMMIT")]
    assert len(await nexhb.rows("SELECT DISTINCT xmin FROM device_heartbeats")) == 20


async def test_a_label_added_for_a_rejected_heartbeat_is_used_for_the_next_one(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(batch_max=1))
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    agents = [await nexhb.agent() for _ in range(3)]
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending: list[asyncio.Task[Answer]] = []
        for agent, pct, ssid in zip(agents, (50, 66, 50), ("old", "new", "new"), strict=True):
            sending.append(
                asyncio.create_task(agent.send(now, battery={"pct": pct}, network={"transport": "wifi", "ssid": ssid}))
            )
            while await nexhb.metric("nexhb_intake_items") < len(sending):
                await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200, 422, 200]
    rows = await nexhb.rows("SELECT ssid FROM heartbeat_history ORDER BY device_no")
    assert [row["ssid"] for row in rows] == ["old", "new"]


async def test_creating_a_day_between_two_batches_ends_neither_transaction(
    start_daemon: StartDaemon, now: datetime
) -> None:
    """A rejected heartbeat leaves no status; the transaction of its batch begins only after the day was created."""
    nexhb = await start_daemon(ingest=IngestSettings(batch_max=1))
    missing = now - timedelta(days=2)
    await nexhb.rows("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    await nexhb.rows(f"DROP TABLE {partitions.table_name(missing.date())}")
    agents = [await nexhb.agent() for _ in range(3)]
    lost = 'nexhb_write_retries_total{kind="lost"}'
    before = await nexhb.metric(lost)
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending: list[asyncio.Task[Answer]] = []
        for agent, pct, made_at in zip(agents, (50, 66, 50), (now, missing, now), strict=True):
            sending.append(asyncio.create_task(agent.send(made_at, battery={"pct": pct})))
            while await nexhb.metric("nexhb_intake_items") < len(sending):
                await asyncio.sleep(0.01)
    assert [(await one).status for one in sending] == [200, 422, 200]
    rows = await nexhb.rows("SELECT device_id FROM device_last_status ORDER BY device_no")
    assert [row["device_id"] for row in rows] == [agents[0].device_id, agents[2].device_id]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 2
    assert await nexhb.metric(lost) == before


async def test_a_missing_partition_is_created_when_needed(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon()
    day = (now - timedelta(days=2)).date()
    agent = await nexhb.agent()
    await agent.send(now - timedelta(days=2, minutes=1))
    await nexhb.rows(f"DROP TABLE {partitions.table_name(day)}")
    assert (await agent.send(now - timedelta(days=2))).status == 200
    [row] = await nexhb.rows("SELECT tableoid::regclass::text AS day FROM device_heartbeats")
    assert row["day"] == partitions.table_name(day)


async def test_a_day_that_cannot_be_created_does_not_block_other_days(nexhb: Nexhb, now: datetime) -> None:
    day = (now - timedelta(days=2)).date()
    await nexhb.rows(f"ALTER TABLE device_heartbeats DETACH PARTITION {partitions.table_name(day)}")
    # The name is in use by a table that nexhb does not know.
    await nexhb.rows("DELETE FROM hb_partitions WHERE range_start::date = $1", day)
    late, live = await nexhb.agent(), await nexhb.agent()
    answers = await asyncio.gather(late.send(now - timedelta(days=2)), live.send(now))
    assert [answer.status for answer in answers] == [503, 200]
    assert "partition" in answers[0].body["detail"]
