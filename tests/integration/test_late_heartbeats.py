"""Heartbeats whose day has been dropped are acknowledged, kept, and archived in a supplement of their day."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import orjson

from nexhb import partitions
from nexhb.archive import catalog, restore, verify
from nexhb.archive.file import FolderStore
from nexhb.postgres.connections import Connection
from tests.conftest import Nexhb, StartDaemon
from tests.support.nightly import gone, run_nightly

BACK = timedelta(days=5)


async def archived(conn: Connection, folder: Path, moment: datetime) -> list[list[str]]:
    """Return every row of every archive of the day."""
    store = FolderStore(folder / "archive", timeout_s=30)
    archived_rows: list[list[str]] = []
    for one in await catalog.find(conn, moment.date()):
        manifest = await verify.load(store, store.name_of(one.url), one.sha256)
        async for rows in verify.rows(store, manifest):
            archived_rows += rows
    return archived_rows


async def test_a_writer_that_still_knows_a_sealed_day_cannot_write_into_it(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200  # from now on the writer knows the table
    await gone(nexhb, conn, made)
    answer = await agent.send(made + timedelta(seconds=30))
    assert (answer.status, answer.body["deduplicated"]) == (200, False)
    assert await partitions.count_rows(conn, partitions.table_name(made.date())) == 1
    [row] = await conn.fetch("SELECT * FROM late_heartbeats")
    assert (row["ts"], row["reason"]) == (made + timedelta(seconds=30), "detached")
    assert await nexhb.metric("nexhb_late_heartbeats_total") >= 1
    assert await conn.fetchval("SELECT last_ts FROM device_last_status") == made + timedelta(seconds=30)


async def test_late_and_live_heartbeats_of_one_batch_are_all_stored(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    await gone(nexhb, conn, made)
    beats = [{"device_id": agent.device_id, "timestamp_utc": f"{moment:%Y-%m-%dT%H:%M:%SZ}"} for moment in (made, now)]
    answer = await agent.post(orjson.dumps(beats), "/v1/heartbeats")
    assert (answer.body["written"], answer.body["deduplicated"]) == (2, 0)
    again = await agent.post(orjson.dumps(beats), "/v1/heartbeats")
    assert (again.body["written"], again.body["deduplicated"]) == (0, 2)
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 1
    assert await conn.fetchval("SELECT count(*) FROM device_heartbeats") == 1
    assert (await conn.fetchval("SELECT last_ts FROM device_last_status")).date() == now.date()


async def test_late_and_live_heartbeats_in_a_batch_with_a_duplicate_are_all_stored(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    """If a key exists already, the batch is written through the staging table, which does not contain the dropped
    day."""
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(now)).status == 200
    await gone(nexhb, conn, made)
    other = replace(agent, nexhb=await start_daemon())
    beats = [
        {"device_id": agent.device_id, "timestamp_utc": f"{moment:%Y-%m-%dT%H:%M:%SZ}"}
        for moment in (made, now, now - timedelta(minutes=1))
    ]
    answer = await other.post(orjson.dumps(beats), "/v1/heartbeats")
    assert (answer.status, answer.body["written"], answer.body["deduplicated"]) == (200, 2, 1)
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 1
    assert await conn.fetchval("SELECT count(*) FROM device_heartbeats") == 2


async def test_a_late_heartbeat_with_a_value_that_the_database_rejects_is_rejected(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """The check whether the database accepts the heartbeat without its content also writes into late_heartbeats."""
    agent, made = await nexhb.agent(), now - BACK
    await gone(nexhb, conn, made)
    await conn.execute("ALTER TABLE late_heartbeats ADD CONSTRAINT odd CHECK (battery_pct <> 66)")
    assert (await agent.send(made, battery={"pct": 66.0})).status == 422
    assert (await agent.send(made, battery={"pct": 50.0})).status == 200


async def test_a_dropped_day_is_created_again_neither_by_its_heartbeats_nor_by_a_restart(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    made = now - BACK
    await gone(nexhb, conn, made)
    await conn.execute(f"DROP TABLE {partitions.table_name(made.date())}")
    await conn.execute("UPDATE hb_partitions SET state = 'dropped' WHERE range_start::date = $1", made.date())
    other = await start_daemon()
    assert (await (await other.agent("another")).send(made)).status == 200
    assert [row["reason"] for row in await conn.fetch("SELECT reason FROM late_heartbeats")] == ["dropped"]
    assert not any(p.covers(made.date()) for p in await partitions.attached(conn))


async def test_late_heartbeats_are_archived_once_in_a_supplement_of_their_day(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200
    await gone(nexhb, conn, made)
    # The day's heartbeat is sent again, to another daemon, as if it had been stored but its response had been lost.
    other = replace(agent, nexhb=await start_daemon())
    assert (await other.send(made)).status == 200
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 2

    body = await run_nightly(nexhb)
    assert (body["archived"], body["dropped"], body["late_archived"]) == (1, 1, 1)
    rows = await archived(conn, tmp_path, made)
    assert len(rows) == len({(row[-2], row[-1]) for row in rows}) == 2
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 0
    assert [one.supplement_no > 0 for one in await catalog.find(conn, made.date())] == [False, True]

    # Both heartbeats are sent again after the supplement was archived: neither is new.
    third = replace(agent, nexhb=await start_daemon())
    for minutes in (0, 1):
        assert (await third.send(made + timedelta(minutes=minutes))).status == 200
    assert (await run_nightly(nexhb))["late_archived"] == 0
    assert await conn.fetchval("SELECT count(*) FROM late_heartbeats") == 0
    assert len(await catalog.find(conn, made.date())) == 2


async def test_a_restored_day_includes_its_supplement_and_is_archived_with_it(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200
    await gone(nexhb, conn, made)
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    await run_nightly(nexhb)
    store = FolderStore(tmp_path / "archive", timeout_s=30)
    assert await restore.restore_day(conn, store, await catalog.find(conn, made.date()), now) == 2
    history = await nexhb.get(
        f"/v1/devices/{agent.device_id}/heartbeats?from={partitions.midnight(made.date()):%FT%TZ}"
    )
    assert len(history["heartbeats"]) == 2

    await conn.execute("UPDATE hb_partitions SET restored_at = NULL")
    await gone(nexhb, conn, made)  # detached by hand, because the job would not drop so recent a day
    await run_nightly(nexhb)
    assert len(await catalog.find(conn, made.date())) == 1
    assert len(await archived(conn, tmp_path, made)) == 2


async def test_late_heartbeats_are_moved_into_their_day_once_it_is_restored(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200
    await gone(nexhb, conn, made)
    await run_nightly(nexhb)
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    store = FolderStore(tmp_path / "archive", timeout_s=30)
    await restore.restore_day(conn, store, await catalog.find(conn, made.date()), now)
    assert (await run_nightly(nexhb))["late_merged"] == 1
    assert await conn.fetchval("SELECT count(*) FROM device_heartbeats") == 2
    assert (await agent.send(made + timedelta(minutes=2))).status == 200
    assert await conn.fetchval("SELECT count(*) FROM device_heartbeats") == 3


async def test_an_inactive_device_is_listed_not_counted_as_offline_and_comes_back(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    assert (await agent.live(now - timedelta(hours=1))).status == 200
    assert (await nexhb.get("/v1/devices/offline"))["count"] == 1
    await conn.execute("UPDATE device_last_status SET heard_at = $1", now - timedelta(days=91))
    assert (await run_nightly(nexhb))["inactivated"] == 1
    fleet = await nexhb.get("/v1/fleet")
    assert (fleet["devices"], fleet["online"], fleet["offline"], fleet["inactive"]) == (1, 0, 0, 1)
    assert (await nexhb.get("/v1/devices/offline"))["count"] == 0
    assert [one["status"] for one in (await nexhb.get("/v1/devices"))["devices"]] == ["inactive"]
    assert (await agent.send(now)).status == 200
    fleet = await nexhb.get("/v1/fleet")
    assert (fleet["online"], fleet["inactive"]) == (1, 0)
