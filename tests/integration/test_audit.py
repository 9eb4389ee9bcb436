"""The ledger, written with every commit, and what it is held against."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import pytest

from nexhb import doctor, numbers, partitions, sql
from nexhb.archive import catalog, restore
from nexhb.archive.file import FolderStore
from nexhb.audit import audit
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.errors import BadInput
from nexhb.jobs.board import Jobs
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon, example
from tests.integration.test_late_heartbeats import gone, run_nightly

BACK = timedelta(days=5)


async def test_every_heartbeat_of_a_day_is_in_the_ledger_once(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(10)]
    moments = [now - BACK + timedelta(seconds=30 * n) for n in range(5)]
    await asyncio.gather(*(agent.send(moment) for agent in agents for moment in [*moments, *moments]))
    found = await audit(conn, (now - BACK).date())
    assert (found.written, found.deduplicated, found.in_table, found.missing) == (50, 50, 50, 0)
    assert found.shown()["ok"] is True


async def test_a_batch_of_several_days_is_added_to_each(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    queue = [example(now - timedelta(days=n), device_id=agent.device_id) for n in (0, 1, 2)]
    assert (await agent.post(orjson.dumps([*queue, queue[1]]), "/v1/heartbeats")).body["written"] == 3
    for days, deduplicated in ((0, 0), (1, 1), (2, 0)):
        found = await audit(conn, (now - timedelta(days=days)).date())
        assert (found.written, found.deduplicated, found.missing) == (1, deduplicated, 0)


async def test_a_key_that_is_stored_already_is_deduplicated_in_the_ledger_too(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    other = replace(agent, nexhb=await start_daemon())  # it has not seen the key: the staging way
    assert (await other.send(now)).body["deduplicated"]
    found = await audit(conn, now.date())
    assert (found.written, found.deduplicated, found.missing) == (1, 1, 0)
    slots = await conn.fetch("SELECT slot FROM ingest_ledger")
    assert len(slots) == 2  # one a daemon: neither waits for the other


async def test_a_row_that_vanished_is_missing_and_one_that_nobody_committed_is_too_much(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent()
    for seconds in (0, 20, 40):
        assert (await agent.send(now - timedelta(seconds=seconds))).status == 200
    await conn.execute("DELETE FROM device_heartbeats WHERE ts = $1", now)
    days = {now.date(), (now - timedelta(seconds=40)).date()}
    assert sum([(await audit(conn, day)).missing for day in days]) == 1
    await conn.execute("UPDATE device_heartbeats SET bucket = bucket + 1000 WHERE ts < $1", now)
    await conn.execute("INSERT INTO device_heartbeats "
                       "SELECT ts, received_at, device_no, bucket + 5000, label_no, uptime_s, ram_used_mb, temp_c, "
                       "battery_pct, signal_dbm, plugged, unity_running, clock_wrong, ip "
                       "FROM device_heartbeats")  # fmt: skip
    assert sum([(await audit(conn, day)).missing for day in days]) == -1


async def test_the_ledger_holds_through_archive_late_heartbeats_and_supplement(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    for minutes in range(3):
        assert (await agent.send(made + timedelta(minutes=minutes))).status == 200
    await gone(nexhb, conn, made)
    assert (await audit(conn, made.date())).missing == 0
    other = replace(agent, nexhb=await start_daemon())
    for minutes in (2, 3):  # one that is there already, and a new one: both go aside, both counted as written
        assert (await other.send(made + timedelta(minutes=minutes))).status == 200
    found = await audit(conn, made.date())
    assert (found.written, found.in_table, found.late) == (5, 3, 2)
    await run_nightly(nexhb)
    found = await audit(conn, made.date())
    assert (found.written, found.deduplicated, found.in_archive, found.late, found.missing) == (4, 1, 4, 0, 0)
    # And what comes a third time is one more that was deduplicated.
    third = replace(agent, nexhb=await start_daemon())
    assert (await third.send(made)).status == 200
    await run_nightly(nexhb)
    found = await audit(conn, made.date())
    assert (found.written, found.deduplicated, found.missing) == (4, 2, 0)


async def test_a_restored_day_has_no_row_twice(nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200
    await gone(nexhb, conn, made)
    await run_nightly(nexhb)
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    await run_nightly(nexhb)  # the second is in a supplement now
    store = FolderStore(tmp_path / "archive", timeout_s=30)
    assert await restore.restore_day(conn, store, await catalog.find(conn, made.date()), now) == 2
    found = await audit(conn, made.date())
    assert (found.written, found.in_table, found.in_archive, found.missing) == (2, 2, 0, 0)


async def test_closed_days_are_folded_into_one_row(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    day = now.date() - timedelta(days=9)
    await partitions.ensure(conn, [day])
    await conn.execute("INSERT INTO ingest_ledger SELECT $1, n, 10, 1 FROM generate_series(1, 50) n", day)
    await conn.execute("INSERT INTO ingest_ledger SELECT $1, n, 10, 1 FROM generate_series(1, 50) n", now.date())
    await run_nightly(nexhb)
    rows = await conn.fetch("SELECT slot, written, deduplicated FROM ingest_ledger WHERE day = $1", day)
    assert [tuple(row) for row in rows] == [(0, 500, 50)]
    assert await conn.fetchval("SELECT count(*) FROM ingest_ledger WHERE day = $1", now.date()) == 50


async def test_a_day_that_never_was_is_named(conn: Connection, now: datetime) -> None:
    with pytest.raises(BadInput, match="There is no day"):
        await audit(conn, now.date())


async def test_a_failed_batch_is_in_no_ledger(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    await conn.execute("ALTER TABLE device_last_status ADD CONSTRAINT never CHECK (battery_pct <> 13)")
    assert (await agent.send(now, battery={"pct": 13})).status == 422
    assert (await agent.send(now, battery={"pct": 14})).status == 200
    found = await audit(conn, now.date())
    assert (found.written, found.in_table) == (1, 1)


async def test_the_counters_add_up_at_every_moment(nexhb: Nexhb, now: datetime) -> None:
    """received = written + deduplicated + refused + failed + what is unanswered."""
    agents = [await nexhb.agent() for _ in range(20)]
    names = ("heartbeats_ingested_total", "hb_writes_total", "hb_dedupe_total", "nexhb_heartbeats_refused_total",
             "nexhb_heartbeats_failed_total", "nexhb_intake_items")  # fmt: skip

    async def difference() -> float:
        text = await (await nexhb.http.get(f"{nexhb.url}/metrics", headers={"x-admin": ADMIN_KEY})).text()
        found = dict.fromkeys(names, 0.0)
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in found:
                found[name] += float(line.rpartition(" ")[2])
        received, *ends = found.values()
        return received - sum(ends)

    start = await difference()

    async def send(number: int) -> None:
        agent = agents[number % 20]
        kind = number % 4
        if kind == 0:
            await agent.post(b"{")
        elif kind == 1:
            await agent.post(orjson.dumps([example(now, device_id=agent.device_id), 5]), "/v1/heartbeats")
        else:
            await agent.send(now - timedelta(seconds=10 * number))

    sending = [asyncio.create_task(send(number)) for number in range(200)]
    while not all(task.done() for task in sending):
        assert await difference() == start
    assert await difference() == start


async def test_rows_without_their_label_or_device_are_read_and_reported(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Reads, the view too, left out a row whose label was missing, and the audit found nothing."""
    agents = [await nexhb.agent(name) for name in ("kiosk-1", "kiosk-2")]
    for number, agent in enumerate(agents):
        network = {"transport": "wifi", "ssid": f"shop-{number}", "ip": "192.168.1.50"}
        assert (await agent.send(now, network=network)).status == 200
    await conn.execute("DELETE FROM heartbeat_labels WHERE ssid = 'shop-0'")
    await conn.execute("DELETE FROM device_tokens t USING devices d WHERE t.device_no = d.device_no AND device_id = $1",
                       "kiosk-2")  # fmt: skip
    await conn.execute("DELETE FROM devices WHERE device_id = 'kiosk-2'")
    day = await conn.fetchval("SELECT (ts AT TIME ZONE 'UTC')::date FROM device_heartbeats LIMIT 1")
    found = await audit(conn, day)
    assert (found.missing, found.dangling_devices, found.dangling_labels, found.ok) == (0, 1, 1, False)
    rows = await conn.fetch("SELECT device_id, ssid FROM heartbeat_history ORDER BY device_id")
    assert [tuple(row) for row in rows] == [("kiosk-1", None), (None, "shop-1")]
    [read] = (await nexhb.get("/v1/devices/kiosk-1/heartbeats"))["heartbeats"]
    assert (read["ssid"], read["battery_pct"]) == (None, 87)
    line = await doctor._QUESTIONS["numbers"](doctor.Visit(conn, nexhb.settings, now))
    assert (line.good, "name a device" in line.said) == (False, True)
    for name in ("offline", "unity-down"):
        assert (await nexhb.get(f"/v1/devices/{name}"))["devices"] == []


LATE_ROW = """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
    VALUES ($1, $1, 9, 1, 7, false, 'dropped')"""


async def test_late_rows_without_their_label_or_device_are_reported_too(conn: Connection, now: datetime) -> None:
    await partitions.ensure(conn, [now.date()])
    await conn.execute(LATE_ROW, now)
    found = await audit(conn, now.date())
    assert (found.late, found.dangling_devices, found.dangling_labels, found.ok) == (1, 1, 1, False)
    line = await doctor._QUESTIONS["numbers"](doctor.Visit(conn, Settings(), now))
    assert (line.good, "1 rows of today name a device that is not there, 1 a label" in line.said) == (False, True)


@pytest.mark.parametrize(
    ("row", "used", "says"),
    [
        (LATE_ROW, {"device": 9, "label": 7}, "1 rows of today name a device"),
        ("INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong) "
         "VALUES ($1, $1, 9, 1, 7, false)", {"device": 9}, "1 rows of today name a device"),
        ("INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
         "VALUES (9, 'gone', $1, $1, $1)", {"device": 9}, "1 rows of today name a device"),
        ("INSERT INTO heartbeat_labels OVERRIDING SYSTEM VALUE "
         "SELECT 7, '1', '', '', '' WHERE $1::timestamptz < 'infinity'",
         {"label": 7}, "the next label gets number 1 of 7"),
        ("INSERT INTO job_runs (run_no, job, started_at, status, host) OVERRIDING SYSTEM VALUE "
         "VALUES (5, 'nightly', $1, 'completed', 'a')", {"job run": 5}, "the next job run gets number 1 of 5"),
        ("INSERT INTO feature_flag_changes (change_no, flag, changed_at, changed_by) OVERRIDING SYSTEM VALUE "
         "VALUES (5, 'perf_diff', $1, 'a')", {"flag change": 5}, "the next flag change gets number 1 of 5"),
    ],
    ids=["late", "history", "status", "label", "job run", "flag change"],
)  # fmt: skip
async def test_a_number_is_in_use_wherever_it_stands(
    conn: Connection, now: datetime, row: str, used: dict[str, int], says: str
) -> None:
    """The sequence is raised above the number, also where only one of the tables holds it."""
    await partitions.ensure(conn, [now.date()])
    await conn.execute(row, now)
    assert {one["what"]: one["used"] for one in await numbers.behind(conn)} == used
    line = await doctor._QUESTIONS["numbers"](doctor.Visit(conn, Settings(), now))
    assert (line.good, says in line.said) == (False, True), line
    await numbers.raise_sequences(conn)
    assert await numbers.behind(conn) == []


async def test_a_table_that_is_locked_does_not_hold_up_the_start(database: Database, conn: Connection) -> None:
    """Devices wait for it, and the lock may be held for hours."""
    async with database.connected(application="test start") as starting, conn.transaction():
        await conn.execute("LOCK TABLE late_heartbeats IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(SOON_S):
            await numbers.raise_sequences(starting)


async def test_sequences_that_would_give_a_number_twice_are_raised_at_the_start(
    conn: Connection, start_daemon: StartDaemon, now: datetime
) -> None:
    """A restore of the data alone leaves them at 1: the next device got the number, and the history, of another."""
    await conn.execute("INSERT INTO heartbeat_labels OVERRIDING SYSTEM VALUE VALUES (7, '1', '', 'wifi', 'shop')")
    await conn.execute("INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
                       "VALUES (9, 'gone', $1, $1, $1)", now)  # fmt: skip
    visit = doctor.Visit(conn, Settings(), now)
    assert "the next label gets number 1 of 7" in "; ".join(
        f"the next {row['what']} gets number {row['given'] + 1} of {row['used']}" for row in await numbers.behind(conn)
    )
    agent = await (await start_daemon()).agent("kiosk-1")
    assert await conn.fetchval("SELECT device_no FROM devices WHERE device_id = $1", agent.device_id) == 10
    assert (await agent.send(now)).status == 200
    assert await conn.fetchval("SELECT max(label_no) FROM heartbeat_labels") == 8
    assert await numbers.behind(conn) == []
    assert not (await doctor._QUESTIONS["numbers"](visit)).good  # the status of a device that is not there


async def test_a_job_raises_the_sequences_before_it_is_written_down(
    conn: Connection, database: Database, now: datetime
) -> None:
    """A copy by CREATE DATABASE … TEMPLATE that crashed gave the number of a run once more: each nightly run failed, as
    often as numbers were missing."""
    await conn.execute(
        "INSERT INTO job_runs (run_no, job, started_at, status, host) OVERRIDING SYSTEM VALUE "
        "VALUES (1, 'reconcile', $1, 'completed', 'a')",
        now,
    )
    run = await Jobs(database, Settings(), lambda: now).reconcile()
    assert run.status == "completed"
    assert await conn.fetchval("SELECT max(run_no) FROM job_runs") == 2


async def test_every_sequence_is_looked_at(conn: Connection) -> None:
    """A table with a number of its own that is added later is looked at, too."""
    there = {row[0] for row in await conn.fetch("SELECT seqrelid::regclass::text FROM pg_sequence")}
    asked = {row["sequence"].rpartition(".")[2] for row in await conn.fetch(sql.queries("numbers")["sequences"])}
    assert asked == there
