"""The ledger, which is written with every commit, and its comparison with the rows."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import pytest

from nexhb import partitions
from nexhb.archive import catalog, restore
from nexhb.archive.file import FolderStore
from nexhb.audit import audit
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.doctor.check import CheckContext
from nexhb.errors import BadInput
from nexhb.jobs.registry import Jobs
from nexhb.postgres import numbers, sql
from nexhb.postgres.connections import Connection, Database
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon, example
from tests.support.nightly import gone, run_nightly

BACK = timedelta(days=5)


async def test_every_heartbeat_of_a_day_is_in_the_ledger_once(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(10)]
    moments = [now - BACK + timedelta(seconds=30 * n) for n in range(5)]
    await asyncio.gather(*(agent.send(moment) for agent in agents for moment in [*moments, *moments]))
    result = await audit(conn, (now - BACK).date())
    assert (result.written, result.deduplicated, result.in_table, result.missing) == (50, 50, 50, 0)
    assert result.as_dict()["ok"] is True


async def test_a_batch_of_several_days_is_added_to_each_day(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    queue = [example(now - timedelta(days=n), device_id=agent.device_id) for n in (0, 1, 2)]
    assert (await agent.post(orjson.dumps([*queue, queue[1]]), "/v1/heartbeats")).body["written"] == 3
    for days, deduplicated in ((0, 0), (1, 1), (2, 0)):
        result = await audit(conn, (now - timedelta(days=days)).date())
        assert (result.written, result.deduplicated, result.missing) == (1, deduplicated, 0)


async def test_a_duplicate_key_is_deduplicated_in_the_ledger_too(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    # The other daemon has not seen the key, so the batch goes through the staging table.
    other = replace(agent, nexhb=await start_daemon())
    assert (await other.send(now)).body["deduplicated"]
    result = await audit(conn, now.date())
    assert (result.written, result.deduplicated, result.missing) == (1, 1, 0)
    slots = await conn.fetch("SELECT slot FROM ingest_ledger")
    assert len(slots) == 2  # one row per daemon, so that no daemon waits for another


async def test_a_deleted_row_is_missing_and_a_row_that_was_never_committed_is_surplus(
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


async def test_the_ledger_agrees_after_archive_late_heartbeats_and_supplement(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    agent, made = await nexhb.agent(), now - BACK
    for minutes in range(3):
        assert (await agent.send(made + timedelta(minutes=minutes))).status == 200
    await gone(nexhb, conn, made)
    assert (await audit(conn, made.date())).missing == 0
    other = replace(agent, nexhb=await start_daemon())
    for minutes in (2, 3):  # a duplicate and a new heartbeat: both are stored as late, and counted as written
        assert (await other.send(made + timedelta(minutes=minutes))).status == 200
    result = await audit(conn, made.date())
    assert (result.written, result.in_table, result.late) == (5, 3, 2)
    await run_nightly(nexhb)
    result = await audit(conn, made.date())
    assert (result.written, result.deduplicated, result.in_archive, result.late, result.missing) == (4, 1, 4, 0, 0)
    # A copy sent to a third daemon is deduplicated too.
    third = replace(agent, nexhb=await start_daemon())
    assert (await third.send(made)).status == 200
    await run_nightly(nexhb)
    result = await audit(conn, made.date())
    assert (result.written, result.deduplicated, result.missing) == (4, 2, 0)


async def test_a_restored_day_has_no_row_twice(nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path) -> None:
    agent, made = await nexhb.agent(), now - BACK
    assert (await agent.send(made)).status == 200
    await gone(nexhb, conn, made)
    await run_nightly(nexhb)
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    await run_nightly(nexhb)  # the second heartbeat is now in a supplement
    store = FolderStore(tmp_path / "archive", timeout_s=30)
    assert await restore.restore_day(conn, store, await catalog.find(conn, made.date()), now) == 2
    result = await audit(conn, made.date())
    assert (result.written, result.in_table, result.in_archive, result.missing) == (2, 2, 0, 0)


async def test_the_ledger_of_closed_days_is_merged_into_one_row(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    day = now.date() - timedelta(days=9)
    await partitions.ensure(conn, [day])
    await conn.execute("INSERT INTO ingest_ledger SELECT $1, n, 10, 1 FROM generate_series(1, 50) n", day)
    await conn.execute("INSERT INTO ingest_ledger SELECT $1, n, 10, 1 FROM generate_series(1, 50) n", now.date())
    await run_nightly(nexhb)
    rows = await conn.fetch("SELECT slot, written, deduplicated FROM ingest_ledger WHERE day = $1", day)
    assert [tuple(row) for row in rows] == [(0, 500, 50)]
    assert await conn.fetchval("SELECT count(*) FROM ingest_ledger WHERE day = $1", now.date()) == 50


async def test_a_day_without_a_partition_is_an_error(conn: Connection, now: datetime) -> None:
    with pytest.raises(BadInput, match="There is no partition for"):
        await audit(conn, now.date())


async def test_a_failed_batch_is_in_no_ledger(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    await conn.execute("ALTER TABLE device_last_status ADD CONSTRAINT never CHECK (battery_pct <> 13)")
    assert (await agent.send(now, battery={"pct": 13})).status == 422
    assert (await agent.send(now, battery={"pct": 14})).status == 200
    result = await audit(conn, now.date())
    assert (result.written, result.in_table) == (1, 1)


async def test_the_counters_add_up_at_every_moment(nexhb: Nexhb, now: datetime) -> None:
    """The number of received heartbeats equals written + deduplicated + refused + failed + those still without a
    response."""
    agents = [await nexhb.agent() for _ in range(20)]
    names = ("heartbeats_ingested_total", "hb_writes_total", "hb_dedupe_total", "nexhb_heartbeats_refused_total",
             "nexhb_heartbeats_failed_total", "nexhb_intake_items")  # fmt: skip

    async def difference() -> float:
        text = await (await nexhb.http.get(f"{nexhb.url}/metrics", headers={"x-admin": ADMIN_KEY})).text()
        result = dict.fromkeys(names, 0.0)
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in result:
                result[name] += float(line.rpartition(" ")[2])
        received, *ends = result.values()
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
    """Formerly, reads, including the view, omitted a row whose label was missing, and the audit reported nothing."""
    agents = [await nexhb.agent(name) for name in ("kiosk-1", "kiosk-2")]
    for number, agent in enumerate(agents):
        network = {"transport": "wifi", "ssid": f"shop-{number}", "ip": "192.168.1.50"}
        assert (await agent.send(now, network=network)).status == 200
    await conn.execute("DELETE FROM heartbeat_labels WHERE ssid = 'shop-0'")
    await conn.execute("DELETE FROM device_tokens t USING devices d WHERE t.device_no = d.device_no AND device_id = $1",
                       "kiosk-2")  # fmt: skip
    await conn.execute("DELETE FROM devices WHERE device_id = 'kiosk-2'")
    day = await conn.fetchval("SELECT (ts AT TIME ZONE 'UTC')::date FROM device_heartbeats LIMIT 1")
    result = await audit(conn, day)
    assert (result.missing, result.dangling_devices, result.dangling_labels, result.ok) == (0, 1, 1, False)
    rows = await conn.fetch("SELECT device_id, ssid FROM heartbeat_history ORDER BY device_id")
    assert [tuple(row) for row in rows] == [("kiosk-1", None), (None, "shop-1")]
    [read] = (await nexhb.get("/v1/devices/kiosk-1/heartbeats"))["heartbeats"]
    assert (read["ssid"], read["battery_pct"]) == (None, 87)
    line = await checks.CHECKS["numbers"](CheckContext(conn, nexhb.settings, now))
    assert (line.passed, "refer to a missing device" in line.detail) == (False, True)
    for name in ("offline", "unity-down"):
        assert (await nexhb.get(f"/v1/devices/{name}"))["devices"] == []


LATE_ROW = """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
    VALUES ($1, $1, 9, 1, 7, false, 'dropped')"""


async def test_late_rows_without_their_label_or_device_are_reported_too(conn: Connection, now: datetime) -> None:
    await partitions.ensure(conn, [now.date()])
    await conn.execute(LATE_ROW, now)
    result = await audit(conn, now.date())
    assert (result.late, result.dangling_devices, result.dangling_labels, result.ok) == (1, 1, 1, False)
    line = await checks.CHECKS["numbers"](CheckContext(conn, Settings(), now))
    assert (line.passed, "1 rows of today refer to a missing device, 1 to a missing label" in line.detail) == (
        False,
        True,
    )


@pytest.mark.parametrize(
    ("row", "used", "says"),
    [
        (LATE_ROW, {"device": 9, "label": 7}, "1 rows of today refer to a missing device"),
        ("INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong) "
         "VALUES ($1, $1, 9, 1, 7, false)", {"device": 9}, "1 rows of today refer to a missing device"),
        ("INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
         "VALUES (9, 'gone', $1, $1, $1)", {"device": 9}, "1 rows of today refer to a missing device"),
        ("INSERT INTO heartbeat_labels OVERRIDING SYSTEM VALUE "
         "SELECT 7, '1', '', '', '' WHERE $1::timestamptz < 'infinity'",
         {"label": 7}, "the next label would get number 1, although 7 is in use"),
        ("INSERT INTO job_runs (run_no, job, started_at, status, host) OVERRIDING SYSTEM VALUE "
         "VALUES (5, 'nightly', $1, 'completed', 'a')", {"job run": 5},
         "the next job run would get number 1, although 5 is in use"),
        ("INSERT INTO feature_flag_changes (change_no, flag, changed_at, changed_by) OVERRIDING SYSTEM VALUE "
         "VALUES (5, 'perf_diff', $1, 'a')", {"flag change": 5},
         "the next flag change would get number 1, although 5 is in use"),
    ],
    ids=["late", "history", "status", "label", "job run", "flag change"],
)  # fmt: skip
async def test_a_number_that_any_table_uses_is_not_assigned_again(
    conn: Connection, now: datetime, row: str, used: dict[str, int], says: str
) -> None:
    """The sequence is raised above the highest number even if only one of the tables contains that number."""
    await partitions.ensure(conn, [now.date()])
    await conn.execute(row, now)
    assert {one["what"]: one["used"] for one in await numbers.lagging_sequences(conn)} == used
    line = await checks.CHECKS["numbers"](CheckContext(conn, Settings(), now))
    assert (line.passed, says in line.detail) == (False, True), line
    await numbers.raise_sequences(conn)
    assert await numbers.lagging_sequences(conn) == []


async def test_a_locked_table_does_not_delay_the_start(database: Database, conn: Connection) -> None:
    """The start must not wait for the lock: another session may hold it for hours, and devices wait until the daemon
    has started."""
    async with database.connected(application="test start") as starting, conn.transaction():
        await conn.execute("LOCK TABLE late_heartbeats IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(SOON_S):
            await numbers.raise_sequences(starting)


async def test_sequences_that_would_assign_a_number_twice_are_raised_at_the_start(
    conn: Connection, start_daemon: StartDaemon, now: datetime
) -> None:
    """A data-only restore leaves the sequences at 1. Formerly, the next device got the number, and the history, of
    another device."""
    await conn.execute("INSERT INTO heartbeat_labels OVERRIDING SYSTEM VALUE VALUES (7, '1', '', 'wifi', 'shop')")
    await conn.execute("INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
                       "VALUES (9, 'gone', $1, $1, $1)", now)  # fmt: skip
    context = CheckContext(conn, Settings(), now)
    behind = await numbers.lagging_sequences(conn)
    assert ("label", 0, 7) in [(row["what"], row["given"], row["used"]) for row in behind]
    agent = await (await start_daemon()).agent("kiosk-1")
    assert await conn.fetchval("SELECT device_no FROM devices WHERE device_id = $1", agent.device_id) == 10
    assert (await agent.send(now)).status == 200
    assert await conn.fetchval("SELECT max(label_no) FROM heartbeat_labels") == 8
    assert await numbers.lagging_sequences(conn) == []
    assert not (await checks.CHECKS["numbers"](context)).passed  # a status refers to a missing device


async def test_a_job_raises_the_sequences_before_it_is_recorded(
    conn: Connection, database: Database, now: datetime
) -> None:
    """Formerly, after a crash, a database that had been copied by CREATE DATABASE … TEMPLATE assigned numbers of
    earlier runs again, and nightly runs failed until the sequence had passed the highest number."""
    await conn.execute(
        "INSERT INTO job_runs (run_no, job, started_at, status, host) OVERRIDING SYSTEM VALUE "
        "VALUES (1, 'reconcile', $1, 'completed', 'a')",
        now,
    )
    run = await Jobs(database, Settings(), lambda: now).reconcile()
    assert run.status == "completed"
    assert await conn.fetchval("SELECT max(run_no) FROM job_runs") == 2


async def test_every_sequence_is_checked(conn: Connection) -> None:
    """A table with its own number that is added later must be checked too."""
    existing = {row[0] for row in await conn.fetch("SELECT seqrelid::regclass::text FROM pg_sequence")}
    checked = {row["sequence"].rpartition(".")[2] for row in await conn.fetch(sql.queries("numbers")["sequences"])}
    assert checked == existing
