"""device_last_status is repaired from the history: completely, only wrong rows, and never to an older state."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from nexhb import partitions
from nexhb.devices import registry
from nexhb.heartbeat import bucket_of
from nexhb.jobs.reconcile import ReconcileResult, reconcile
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S
from tests.support.history import DAY, MINUTE, NOW, THESE, add_devices, add_history, numbers, status_of, turn_back

ALL = 1_000_000  # more repairs than any fleet in these tests needs

STATUS = """last_ts, received_at, battery_pct, plugged, temp_c, network_type, ssid, ip, signal_dbm, uptime_s,
    ram_used_mb, unity_pkg_version, unity_running, agent_version, clock_wrong, heard_at"""
OF_HISTORY = STATUS.replace("last_ts", "ts AS last_ts").replace("heard_at", "received_at AS heard_at")
NEWEST = f"""SELECT DISTINCT ON (device_no) device_no, device_id, {OF_HISTORY}
    FROM heartbeat_history WHERE ts > $1 AND ts <= $2 ORDER BY device_no, ts DESC"""


# ---- a fleet, filled by SQL -------------------------------------------------------------------------------------


@pytest.fixture
async def fleet(conn: Connection) -> Connection:
    """Provide the days around NOW, four labels (one of them empty), and no devices."""
    await partitions.ensure(conn, partitions.days_between((NOW - 2 * DAY).date(), (NOW + 2 * DAY).date()))
    await conn.execute(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
        VALUES ('', '', '', ''), ('1.0.9', '2.1.0', 'wifi', 'Store-42'), ('1.0.9', '', 'cellular', ''),
               ('1.1.0', '2.2.0', 'wifi', 'Store-7')"""
    )
    return conn


async def add_right_statuses(conn: Connection, which: str = "true") -> None:
    """Add the status that follows from the newest heartbeat, for the devices n for which `which` is true."""
    await conn.execute(
        f"""INSERT INTO device_last_status (device_no, device_id, {STATUS})
        SELECT * FROM ({NEWEST}) h WHERE {THESE.format(which=which)}""",
        NOW - 2 * DAY, NOW + 2 * DAY,
    )  # fmt: skip


async def right_fleet(conn: Connection, count: int) -> None:
    """Add devices with three heartbeats each in the last hour, and their statuses."""
    await add_devices(conn, count)
    await add_history(conn, 40 * MINUTE, 20 * MINUTE, 1 * MINUTE)
    await add_right_statuses(conn)


async def broken_fleet(conn: Connection, count: int) -> None:
    """Add the devices and heartbeats of `right_fleet`, without any status."""
    await add_devices(conn, count)
    await add_history(conn, 40 * MINUTE, 20 * MINUTE, 1 * MINUTE)


async def versions(conn: Connection) -> dict[int, tuple[str, ...]]:
    """Return ctid, xmin and xmax of each status row by device_no: any write or lock of a row changes one of these."""
    rows = await conn.fetch("SELECT device_no, ctid::text, xmin::text, xmax::text FROM device_last_status")
    return {row["device_no"]: (row["ctid"], row["xmin"], row["xmax"]) for row in rows}


async def touched_since(conn: Connection, before: dict[int, tuple[str, ...]]) -> list[int]:
    """Return the devices whose status row was written, locked or created since `versions` returned `before`."""
    after = await versions(conn)
    assert before.keys() <= after.keys()
    return sorted(number for number, version in after.items() if before.get(number) != version)


async def differences(conn: Connection, which: str = "true") -> list[asyncpg.Record]:
    """Return statuses that differ from the newest heartbeat of the last day, and the values that they should have."""
    rows: list[asyncpg.Record] = await conn.fetch(
        f"""WITH newest AS ({NEWEST}), expected AS (SELECT * FROM newest),
             found AS (SELECT device_no, device_id, {STATUS} FROM device_last_status)
        SELECT * FROM ((TABLE expected EXCEPT TABLE found) UNION ALL (TABLE found EXCEPT TABLE expected)) d
        WHERE {THESE.format(which=which)}""",
        NOW - DAY, NOW + DAY,
    )  # fmt: skip
    return rows


def drift() -> float | None:
    """Return the share of wrong rows according to the metric."""
    return REGISTRY.get_sample_value("nexhb_reconciliation_drift_ratio")


def rows_updated() -> float:
    """Return the value of the metric that counts repaired rows."""
    return REGISTRY.get_sample_value("reconciliation_rows_updated_total") or 0.0


# ---- wrong rows are repaired, and no others ---------------------------------------------------------------------


async def test_12_000_wrong_rows_of_20_000_are_repaired_in_three_runs_of_5_000(fleet: Connection) -> None:
    await right_fleet(fleet, 20_000)
    await turn_back(fleet, 40 * MINUTE, "n % 5 IN (2, 3)")
    await fleet.execute("DELETE FROM device_last_status WHERE device_no % 5 = 4")
    await turn_back(fleet, -2 * MINUTE, "n % 5 = 1")  # correct: newer than the history
    before = await versions(fleet)
    updated_before = rows_updated()

    first = await reconcile(fleet, NOW, max_rows=5_000)
    assert (first.wrong, first.updated, first.complete) == (5_000, 5_000, False)
    assert drift() == 5_000 / first.checked
    second = await reconcile(fleet, NOW, max_rows=5_000, after=first.next_device_no)
    assert (second.wrong, second.updated, second.complete) == (5_000, 5_000, False)
    third = await reconcile(fleet, NOW, max_rows=5_000, after=second.next_device_no)
    assert third == ReconcileResult(checked=20_000, wrong=2_000, updated=2_000, next_device_no=0, complete=True)
    assert drift() == 0.1

    assert rows_updated() - updated_before == 12_000
    touched = await touched_since(fleet, before)
    assert touched == [number for number in range(1, 20_001) if number % 5 in (2, 3, 4)]
    assert len(touched) == 12_000
    assert await differences(fleet, "n % 5 <> 1") == []
    # These statuses are still newer than the history: two differing rows for each of 4,000 devices.
    assert len(await differences(fleet, "n % 5 = 1")) == 8_000


async def test_a_repaired_row_has_all_values_of_the_newest_heartbeat(fleet: Connection) -> None:
    await right_fleet(fleet, 8)
    await turn_back(fleet, 40 * MINUTE, "n % 2 = 0")
    await fleet.execute("DELETE FROM device_last_status WHERE device_no % 2 = 1")
    await reconcile(fleet, NOW, max_rows=ALL)
    assert await differences(fleet) == []
    rows = await fleet.fetch("SELECT * FROM device_last_status ORDER BY device_no")
    assert {row["ssid"] for row in rows} == {None, "Store-42", "Store-7"}  # none is ''
    assert {row["network_type"] for row in rows} == {None, "wifi", "cellular"}
    assert {row["unity_pkg_version"] for row in rows} == {None, "2.1.0", "2.2.0"}
    assert {row["agent_version"] for row in rows} == {None, "1.0.9", "1.1.0"}
    assert [row["device_id"] for row in rows] == [f"kiosk-{number}" for number in range(1, 9)]
    assert {row["status"] for row in rows} == {"ok"}


async def test_a_status_whose_label_is_missing_is_repaired_without_its_texts(fleet: Connection) -> None:
    await broken_fleet(fleet, 4)
    await fleet.execute("DELETE FROM heartbeat_labels")
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == 4
    expected_status = await status_of(fleet, 2)
    assert (expected_status["last_ts"], expected_status["ssid"]) == (NOW - MINUTE, None)


async def test_a_second_run_repairs_nothing(fleet: Connection) -> None:
    await broken_fleet(fleet, 100)
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == 100
    before = await versions(fleet)
    assert await reconcile(fleet, NOW, max_rows=ALL) == ReconcileResult(100, 0, 0, 0, complete=True)
    assert await touched_since(fleet, before) == []


@pytest.mark.parametrize("dry_run", [False, True])
async def test_a_run_on_correct_data_writes_and_locks_nothing(fleet: Connection, dry_run: bool) -> None:
    await right_fleet(fleet, 2_000)
    await turn_back(fleet, -1 * MINUTE, "n % 2 = 0")
    before = await versions(fleet)
    counters = "SELECT relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_xact_user_tables"
    async with fleet.transaction():
        counted = await fleet.fetch(counters)
        result = await reconcile(fleet, NOW, max_rows=ALL, chunk=300, dry_run=dry_run)
        assert await fleet.fetch(counters) == counted
        # A transaction gets an ID with the first row that it writes or locks.
        assert await fleet.fetchval("SELECT pg_current_xact_id_if_assigned()::text") is None
    assert result == ReconcileResult(2_000, 0, 0, 0, complete=True)
    assert await touched_since(fleet, before) == []
    assert drift() == 0


async def test_a_status_newer_than_the_history_is_kept(fleet: Connection) -> None:
    await right_fleet(fleet, 10)
    await turn_back(fleet, -30 * MINUTE)
    before = await versions(fleet)
    assert (await reconcile(fleet, NOW, max_rows=ALL)).wrong == 0
    assert await touched_since(fleet, before) == []


async def test_a_status_of_the_same_time_is_kept_though_its_values_differ(fleet: Connection) -> None:
    await right_fleet(fleet, 1)
    await fleet.execute("UPDATE device_last_status SET battery_pct = 99, ssid = 'of a duplicate'")
    assert (await reconcile(fleet, NOW, max_rows=ALL)).wrong == 0
    assert (await status_of(fleet, 1))["battery_pct"] == 99


async def test_a_status_of_a_later_heartbeat_of_the_same_bucket_is_kept(fleet: Connection) -> None:
    await right_fleet(fleet, 1)
    await fleet.execute("UPDATE device_last_status SET last_ts = last_ts + interval '4 seconds', battery_pct = 98")
    assert (await reconcile(fleet, NOW, max_rows=ALL)).wrong == 0
    assert (await status_of(fleet, 1))["battery_pct"] == 98


# ---- which history counts ---------------------------------------------------------------------------------------


async def test_a_device_without_a_heartbeat_in_24_hours_is_left_alone(fleet: Connection) -> None:
    await add_devices(fleet, 3)
    await add_history(fleet, 30 * 60 * MINUTE, DAY, which="n <= 2")
    await add_right_statuses(fleet, "n = 2")
    await turn_back(fleet, 60 * MINUTE)
    before = await versions(fleet)
    assert await reconcile(fleet, NOW, max_rows=ALL) == ReconcileResult(3, 0, 0, 0, complete=True)
    assert await touched_since(fleet, before) == []


@pytest.mark.parametrize(
    ("age", "counts"),
    [
        (DAY, False),
        (DAY - timedelta(microseconds=1), True),
        (timedelta(0), True),
        (-5 * MINUTE, True),  # a device's clock may be fast
        (-DAY, True),
        (-DAY - timedelta(microseconds=1), False),
    ],
)
async def test_the_reconciliation_reads_the_history_from_a_day_ago_to_a_day_ahead(
    fleet: Connection, age: timedelta, counts: bool
) -> None:
    await add_devices(fleet, 1)
    await add_history(fleet, age)
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == counts
    assert bool(await status_of(fleet, 1)) == counts


async def test_the_newest_is_found_on_the_other_side_of_midnight(fleet: Connection) -> None:
    await add_devices(fleet, 3)
    await add_history(fleet, 13 * 60 * MINUTE)  # yesterday
    await add_history(fleet, 11 * 60 * MINUTE, which="n = 2")  # today
    await add_history(fleet, -13 * 60 * MINUTE, which="n = 3")  # tomorrow
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == 3
    assert await differences(fleet) == []
    assert len({row["last_ts"].date() for row in await fleet.fetch("TABLE device_last_status")}) == 3


async def test_an_hour_long_bucket_that_began_before_the_24_hours_is_read(fleet: Connection) -> None:
    await add_devices(fleet, 1)
    ts = NOW.replace(minute=40) - DAY
    await fleet.execute(
        """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong)
        VALUES ($1, $1, 1, $2, 1, false)""",
        ts, bucket_of(ts, 3_600),
    )  # fmt: skip
    assert (await reconcile(fleet, ts + DAY - MINUTE, max_rows=ALL)).updated == 1


# ---- the order --------------------------------------------------------------------------------------------------


async def test_a_run_continues_after_the_last_one_and_around_to_it(fleet: Connection) -> None:
    await broken_fleet(fleet, 10)
    first = await reconcile(fleet, NOW, max_rows=7)
    assert first == ReconcileResult(checked=7, wrong=7, updated=7, next_device_no=7, complete=False)
    await turn_back(fleet, MINUTE, "n <= 7")
    second = await reconcile(fleet, NOW, max_rows=7, after=first.next_device_no)
    assert second == ReconcileResult(checked=7, wrong=7, updated=7, next_device_no=4, complete=False)
    third = await reconcile(fleet, NOW, max_rows=7, after=second.next_device_no)
    assert third == ReconcileResult(checked=10, wrong=3, updated=3, next_device_no=0, complete=True)
    assert await differences(fleet) == []


async def test_devices_that_are_wrong_again_and_again_do_not_keep_others_from_being_checked(fleet: Connection) -> None:
    """NexMDM's public server checked the same first 5,000 devices in every run of its reconciliation."""
    await broken_fleet(fleet, 30)
    reached: list[list[int]] = []
    after = 0
    for _ in range(4):
        before = await versions(fleet)
        after = (await reconcile(fleet, NOW, max_rows=10, after=after, chunk=7)).next_device_no
        reached.append(await touched_since(fleet, before))
        await turn_back(fleet, MINUTE, "n <= 10")
    assert reached == [list(range(1, 11)), list(range(11, 21)), list(range(21, 31)), list(range(1, 11))]


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
async def test_the_limit_of_repairs_ends_a_chunk_early_and_counts_up_to_there(fleet: Connection, chunk: int) -> None:
    await right_fleet(fleet, 20)
    await turn_back(fleet, MINUTE, "n IN (2, 3, 9, 17)")
    before = await versions(fleet)
    result = await reconcile(fleet, NOW, max_rows=3, chunk=chunk)
    assert result == ReconcileResult(checked=9, wrong=3, updated=3, next_device_no=9, complete=False)
    assert await touched_since(fleet, before) == [2, 3, 9]
    assert drift() == 3 / 9


@pytest.mark.parametrize(("count", "complete"), [(3, True), (4, False)])
async def test_a_run_whose_last_repair_is_its_last_device_is_complete(
    fleet: Connection, count: int, complete: bool
) -> None:
    await right_fleet(fleet, count)
    await turn_back(fleet, MINUTE, "n <= 3")
    result = await reconcile(fleet, NOW, max_rows=3)
    assert result == ReconcileResult(3, 3, 3, next_device_no=0 if complete else 3, complete=complete)


async def test_repairs_that_end_with_the_fleet_leave_the_cursor_at_its_last_device(fleet: Connection) -> None:
    await broken_fleet(fleet, 6)
    result = await reconcile(fleet, NOW, max_rows=2, after=4)
    assert result == ReconcileResult(checked=2, wrong=2, updated=2, next_device_no=6, complete=False)
    result = await reconcile(fleet, NOW, max_rows=ALL, after=result.next_device_no)
    assert result == ReconcileResult(checked=6, wrong=4, updated=4, next_device_no=0, complete=True)


async def test_a_cursor_after_every_device_starts_again(fleet: Connection) -> None:
    await broken_fleet(fleet, 5)
    assert await reconcile(fleet, NOW, max_rows=ALL, after=2**31 - 1) == ReconcileResult(5, 5, 5, 0, complete=True)


async def test_each_device_is_checked_once_with_any_chunk_size_and_across_gaps(fleet: Connection) -> None:
    await broken_fleet(fleet, 40)
    await fleet.execute("DELETE FROM devices WHERE device_no % 4 = 0")
    for chunk in (1, 7, 30, 31):
        await fleet.execute("DELETE FROM device_last_status")
        result = await reconcile(fleet, NOW, max_rows=ALL, after=16, chunk=chunk)
        assert result == ReconcileResult(30, 30, 30, 0, complete=True)


async def test_an_empty_fleet_needs_no_repair(fleet: Connection) -> None:
    assert await reconcile(fleet, NOW, max_rows=ALL) == ReconcileResult(0, 0, 0, 0, complete=True)
    assert drift() == 0


async def test_with_a_limit_of_no_repairs_a_run_checks_nothing_and_does_not_advance(fleet: Connection) -> None:
    await broken_fleet(fleet, 5)
    assert await reconcile(fleet, NOW, max_rows=0, after=3) == ReconcileResult(0, 0, 0, 3, complete=False)
    assert drift() == 0


# ---- a dry run --------------------------------------------------------------------------------------------------


async def test_a_dry_run_counts_what_a_run_would_do_and_changes_nothing(fleet: Connection) -> None:
    await right_fleet(fleet, 20)
    await turn_back(fleet, MINUTE, "n IN (2, 3, 9, 17)")
    await registry.revoke(fleet, "kiosk-11", NOW)
    await fleet.execute("UPDATE device_last_status SET status = 'ok' WHERE device_no = 11")
    for max_rows in (2, 3, 4, ALL):
        before, updated_before = await versions(fleet), rows_updated()
        async with fleet.transaction():
            dry = await reconcile(fleet, NOW, max_rows=max_rows, after=5, chunk=4, dry_run=True)
            assert await fleet.fetchval("SELECT pg_current_xact_id_if_assigned()::text") is None
        assert drift() == dry.wrong / dry.checked
        assert rows_updated() == updated_before
        assert await touched_since(fleet, before) == []
        transaction = fleet.transaction()
        await transaction.start()
        wet = await reconcile(fleet, NOW, max_rows=max_rows, after=5, chunk=4)
        await transaction.rollback()
        assert dry == replace(wet, updated=0)
        assert wet.updated == wet.wrong == min(max_rows, 5)


# ---- revoked and inactive ---------------------------------------------------------------------------------------


async def revoke_unnoticed(conn: Connection, which: str) -> None:
    """Revoke devices without changing their status, as in a copy of a database that was loaded without its triggers."""
    await conn.execute("SET session_replication_role = replica")
    await conn.execute(f"UPDATE devices SET revoked_at = $1 WHERE {which}", NOW)
    await conn.execute("RESET session_replication_role")


async def test_a_revoked_device_is_shown_as_revoked_and_its_values_stay(fleet: Connection) -> None:
    await right_fleet(fleet, 3)
    await revoke_unnoticed(fleet, "device_no <> 3")
    await fleet.execute("UPDATE device_last_status SET battery_pct = 97 WHERE device_no = 1")
    await fleet.execute("UPDATE device_last_status SET status = 'inactive' WHERE device_no = 2")
    before = [await status_of(fleet, number) for number in (1, 2, 3)]
    assert await reconcile(fleet, NOW, max_rows=ALL) == ReconcileResult(3, 2, 2, 0, complete=True)
    after = [await status_of(fleet, number) for number in (1, 2, 3)]
    assert after == [before[0] | {"status": "revoked"}, before[1] | {"status": "revoked"}, before[2]]
    assert (await reconcile(fleet, NOW, max_rows=ALL)).wrong == 0


async def test_a_silent_revoked_device_is_shown_as_revoked(fleet: Connection) -> None:
    await add_devices(fleet, 2)
    await add_history(fleet, 30 * 60 * MINUTE, which="n = 1")
    await add_right_statuses(fleet)
    await revoke_unnoticed(fleet, "true")
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == 1
    assert (await status_of(fleet, 1))["status"] == "revoked"
    assert not await status_of(fleet, 2)  # no heartbeat was ever received, so there is no status


@pytest.mark.parametrize("was", [None, "ok", "inactive", "revoked"])
async def test_a_repaired_row_of_a_revoked_device_is_revoked(fleet: Connection, was: str | None) -> None:
    await right_fleet(fleet, 1)
    await registry.revoke(fleet, "kiosk-1", NOW)
    await turn_back(fleet, MINUTE)
    if was:
        await fleet.execute("UPDATE device_last_status SET status = $1", was)
    else:
        await fleet.execute("DELETE FROM device_last_status")
    assert await reconcile(fleet, NOW, max_rows=ALL) == ReconcileResult(1, 1, 1, 0, complete=True)
    assert (await status_of(fleet, 1))["status"] == "revoked"
    assert await differences(fleet) == []


async def test_an_inactive_device_that_has_sent_a_heartbeat_is_active_again(fleet: Connection) -> None:
    await right_fleet(fleet, 2)
    await turn_back(fleet, MINUTE, "n = 1")
    await fleet.execute("UPDATE device_last_status SET status = 'inactive'")
    assert (await reconcile(fleet, NOW, max_rows=ALL)).updated == 1
    assert [(await status_of(fleet, number))["status"] for number in (1, 2)] == ["ok", "inactive"]


# ---- beside a running daemon ------------------------------------------------------------------------------------


async def waits_for_a_lock(watcher: Connection, conn: Connection) -> None:
    """Return once `conn` waits for a lock."""
    async with asyncio.timeout(SOON_S):
        while (
            await watcher.fetchval("SELECT wait_event_type FROM pg_stat_activity WHERE pid = $1", conn.get_server_pid())
            != "Lock"
        ):
            await asyncio.sleep(0.01)


@pytest.fixture
async def other(database: Database) -> Any:
    """Yield a second connection."""
    conn = await database.connect(application="test other", lock_timeout="5000")
    yield conn
    conn.terminate()


@pytest.fixture
async def watcher(database: Database) -> Any:
    """Yield a third connection, which only observes."""
    conn = await database.connect(application="test watcher")
    yield conn
    conn.terminate()


UPSERT = """INSERT INTO device_last_status AS s (device_no, device_id, last_ts, received_at, heard_at)
    SELECT n, 'kiosk-' || n, ts, ts, ts + interval '1 second' FROM unnest($1::int[], $2::timestamptz[]) u (n, ts)
    ON CONFLICT (device_no) DO UPDATE SET last_ts = excluded.last_ts, received_at = excluded.received_at,
        heard_at = excluded.heard_at
    WHERE excluded.last_ts > s.last_ts"""


@pytest.mark.parametrize("ts", [NOW, NOW - MINUTE], ids=["newer", "as new"])
@pytest.mark.parametrize("there_before", [True, False])
async def test_a_status_written_between_check_and_repair_is_kept(
    fleet: Connection, other: Connection, watcher: Connection, there_before: bool, ts: datetime
) -> None:
    await right_fleet(fleet, 3)
    await turn_back(fleet, 5 * MINUTE)
    if not there_before:
        await fleet.execute("DELETE FROM device_last_status WHERE device_no = 2")
    async with other.transaction():
        await other.execute(UPSERT, [2], [ts])
        running = asyncio.create_task(reconcile(fleet, NOW, max_rows=3))
        await waits_for_a_lock(watcher, fleet)  # the check is over, and each device of the chunk was wrong
    assert await running == ReconcileResult(checked=3, wrong=3, updated=2, next_device_no=0, complete=True)
    kept = await status_of(fleet, 2)
    # The heartbeat in the history was received 2 ms after it was made.
    assert (kept["last_ts"], kept["received_at"]) == (
        ts,
        ts,
    )
    assert await differences(fleet, "n <> 2") == []


async def test_a_row_that_the_writer_corrected_does_not_count_as_a_repair(
    fleet: Connection, other: Connection, watcher: Connection
) -> None:
    await broken_fleet(fleet, 5)
    async with other.transaction():
        await other.execute(UPSERT, [2], [NOW])
        running = asyncio.create_task(reconcile(fleet, NOW, max_rows=3))
        await waits_for_a_lock(watcher, fleet)
    assert await running == ReconcileResult(checked=4, wrong=4, updated=3, next_device_no=4, complete=False)


async def test_rows_are_locked_in_the_writers_order(fleet: Connection, other: Connection, watcher: Connection) -> None:
    await right_fleet(fleet, 4)
    await turn_back(fleet, MINUTE, "n > 1")
    await revoke_unnoticed(fleet, "device_no IN (1, 4)")
    async with other.transaction():
        await other.execute("SELECT FROM device_last_status WHERE device_no = 2 FOR UPDATE")
        running = asyncio.create_task(reconcile(fleet, NOW, max_rows=ALL))
        await waits_for_a_lock(watcher, fleet)
        free = "SELECT device_no FROM device_last_status ORDER BY device_no FOR UPDATE SKIP LOCKED"
        assert await numbers(watcher, free) == [3, 4]
    assert (await running).updated == 4


async def test_a_last_status_never_becomes_older_while_a_fleet_sends(fleet: Connection, other: Connection) -> None:
    """During the reconciliation, statuses are written or omitted at random; a trigger checks every update."""
    await right_fleet(fleet, 60)
    await fleet.execute(
        """CREATE FUNCTION never_back() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.last_ts < OLD.last_ts THEN RAISE 'device % went back', OLD.device_no; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER never_back BEFORE UPDATE ON device_last_status FOR EACH ROW EXECUTE FUNCTION never_back()"""
    )
    choose = random.Random(7)  # noqa: S311 - not a secret
    sending = asyncio.create_task(_send_carelessly(other, choose, rounds=150))
    updated = runs = 0
    while not sending.done():
        result = await reconcile(fleet, NOW, max_rows=ALL, chunk=choose.choice((7, 25, 100)))
        updated, runs = updated + result.updated, runs + 1
    await sending
    await reconcile(fleet, NOW, max_rows=ALL)
    assert updated > 100
    assert runs > 10
    older = """SELECT s.device_no FROM device_last_status s
        WHERE last_ts < (SELECT max(ts) FROM device_heartbeats h WHERE h.device_no = s.device_no)"""
    assert await numbers(fleet, older) == []


async def _send_carelessly(conn: Connection, choose: random.Random, rounds: int) -> None:
    """Write newer and newer heartbeats, in transactions of 30 devices: each gets its history row, and half of them get
    a status 5 s newer than the row, as if a duplicate had set it."""
    for number in range(rounds):
        ts = NOW + number * 10 * timedelta(seconds=1)
        senders = sorted(choose.sample(range(1, 61), 30))
        async with conn.transaction():
            await conn.execute(
                """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong)
                SELECT $1::timestamptz, $1::timestamptz, n, $2, 1, false FROM unnest($3::int[]) n""",
                ts, bucket_of(ts, 10), senders,
            )  # fmt: skip
            written = [n for n in senders if choose.random() < 0.5]
            await conn.execute(UPSERT, written, [ts + timedelta(seconds=5)] * len(written))


async def test_a_device_readmitted_during_a_reconciliation_is_not_hidden(
    fleet: Connection, other: Connection, watcher: Connection
) -> None:
    await right_fleet(fleet, 2)
    await registry.revoke(fleet, "kiosk-1", NOW)
    await fleet.execute("UPDATE device_last_status SET status = 'ok'")
    async with other.transaction():
        await registry.rotate(other, "kiosk-1")
        running = asyncio.create_task(reconcile(fleet, NOW, max_rows=ALL))
        await waits_for_a_lock(watcher, fleet)
    assert await running == ReconcileResult(2, 1, 0, 0, complete=True)
    assert (await status_of(fleet, 1))["status"] == "ok"


@pytest.mark.parametrize("there_before", [True, False])
async def test_a_device_revoked_during_a_reconciliation_stays_revoked(
    fleet: Connection, other: Connection, watcher: Connection, there_before: bool
) -> None:
    await right_fleet(fleet, 2)
    await turn_back(fleet, MINUTE)
    if not there_before:
        await fleet.execute("DELETE FROM device_last_status")
    async with other.transaction():
        await registry.revoke(other, "kiosk-1", NOW)
        running = asyncio.create_task(reconcile(fleet, NOW, max_rows=ALL))
        await waits_for_a_lock(watcher, fleet)
    assert await running == ReconcileResult(2, 2, 2, 0, complete=True)
    assert [(await status_of(fleet, number))["status"] for number in (1, 2)] == ["revoked", "ok"]


async def test_a_lock_timeout_is_raised_and_finished_chunks_are_kept(fleet: Connection, other: Connection) -> None:
    await right_fleet(fleet, 5)
    await turn_back(fleet, MINUTE)
    await fleet.execute("SET lock_timeout = 100")
    before, updated_before = await versions(fleet), rows_updated()
    async with other.transaction():
        await other.execute("SELECT FROM device_last_status WHERE device_no = 4 FOR UPDATE")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await reconcile(fleet, NOW, max_rows=ALL, chunk=1)
    assert [number for number in await touched_since(fleet, before) if number != 4] == [1, 2, 3]
    assert rows_updated() - updated_before == 3
    result = await reconcile(fleet, NOW, max_rows=ALL)
    assert (result.wrong, result.updated) == (2, 2)


# ---- any small fleet, compared with a model
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device in the model. Times are seconds after NOW."""

    number: int
    revoked: bool
    history: tuple[float, ...]
    status: tuple[float, str] | None

    @property
    def expected_status(self) -> tuple[float, str] | None:
        """The status that the device should have."""
        newest = max((ts for ts in self.history if -86_400 < ts <= 86_400), default=None)
        if newest is not None and (self.status is None or self.status[0] < newest):
            was_revoked = self.status is not None and self.status[1] == "revoked"
            return newest, "revoked" if self.revoked or was_revoked else "ok"
        if self.status is None:
            return None
        return self.status[0], "revoked" if self.revoked else self.status[1]


def model(fleet: Sequence[Device], after: int, max_rows: int) -> tuple[ReconcileResult, list[Device]]:
    """Check one device after another, until none is left or the limit of repairs is reached."""
    walk = [d for d in fleet if d.number > after] + [d for d in fleet if d.number <= after]
    result = {device.number: device for device in fleet}
    checked = wrong = 0
    last = after
    for device in walk:
        if wrong == max_rows:
            break
        checked, last = checked + 1, device.number
        if device.expected_status != device.status:
            wrong += 1
            result[last] = replace(device, status=device.expected_status)
    complete = checked == len(fleet)
    return ReconcileResult(checked, wrong, wrong, 0 if complete else last, complete), list(result.values())


# The edges of the history, and times between them; NOW is 3 s into its bucket.
MOMENTS = [-100_000, -86_400, -86_399.999, -86_000, -40_000, -600, -590, -1, 0, 5, 300, 86_399, 86_400, 86_400.5]
moments = st.sampled_from(MOMENTS)


def bucket(seconds: float) -> int:
    """Return the bucket of a time."""
    return bucket_of(moment(seconds), 10)


def moment(seconds: float) -> datetime:
    """Convert seconds after NOW to a time."""
    return NOW + timedelta(seconds=seconds)


histories = st.lists(moments, max_size=4, unique_by=bucket).map(tuple)
statuses = st.none() | st.tuples(moments, st.sampled_from(["ok", "ok", "inactive", "revoked"]))
fleets = st.lists(
    st.builds(Device, st.integers(1, 40), st.booleans(), histories, statuses),
    max_size=12,
    unique_by=lambda device: device.number,
).map(lambda fleet: sorted(fleet, key=lambda device: device.number))


@given(fleets, st.integers(0, 41), st.integers(0, 8) | st.just(ALL), st.integers(1, 6) | st.just(100), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_fleet_is_repaired_to_the_state_of_the_model(
    fleet: Connection, given_fleet: list[Device], after: int, max_rows: int, chunk: int, dry_run: bool
) -> None:
    await _store(fleet, given_fleet)
    expected, expected_status = model(given_fleet, after, max_rows)
    if dry_run:
        dry = await reconcile(fleet, NOW, max_rows=max_rows, after=after, chunk=chunk, dry_run=True)
        assert dry == replace(expected, updated=0)
        assert await _stored(fleet) == {d.number: (*d.status, 100) for d in given_fleet if d.status}
    result = await reconcile(fleet, NOW, max_rows=max_rows, after=after, chunk=chunk)
    assert result == expected
    assert await _stored(fleet) == _as_stored(given_fleet, expected_status)
    while not result.complete:  # every device is reached
        result = await reconcile(fleet, NOW, max_rows=max_rows or 1, after=result.next_device_no, chunk=chunk)
        assert result.updated or result.complete
    every_one = [replace(device, status=device.expected_status) for device in given_fleet]
    assert await _stored(fleet) == _as_stored(given_fleet, every_one)


async def _store(conn: Connection, fleet: Sequence[Device]) -> None:
    """Store the devices. The battery of a heartbeat is its position in the history; the battery of a status is 100."""
    await conn.execute("DELETE FROM device_heartbeats; DELETE FROM device_last_status; DELETE FROM devices")
    await conn.executemany(
        """INSERT INTO devices (device_no, device_id, revoked_at) OVERRIDING SYSTEM VALUE
        VALUES ($1, 'kiosk-' || $1::int, $2)""",
        [(device.number, NOW if device.revoked else None) for device in fleet],
    )
    await conn.executemany(
        """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, battery_pct, clock_wrong)
        VALUES ($1, $1, $2, $3, 1, $4, false)""",
        [(moment(ts), device.number, bucket(ts), place) for device in fleet for place, ts in enumerate(device.history)],
    )
    await conn.execute("SET session_replication_role = replica")  # no trigger corrects a wrong status
    await conn.executemany(
        """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, battery_pct, status)
        VALUES ($1, 'kiosk-' || $1::int, $2, $2, $2, 100, $3)""",
        [(device.number, moment(device.status[0]), device.status[1]) for device in fleet if device.status],
    )
    await conn.execute("RESET session_replication_role")


async def _stored(conn: Connection) -> dict[int, tuple[float, str, int]]:
    rows = await conn.fetch("SELECT device_no, last_ts, status, battery_pct FROM device_last_status")
    return {number: ((ts - NOW).total_seconds(), status, battery) for number, ts, status, battery in rows}


def _as_stored(before: Sequence[Device], after: Sequence[Device]) -> dict[int, tuple[float, str, int]]:
    """Return the expected statuses, each with the battery value that shows its origin."""
    result: dict[int, tuple[float, str, int]] = {}
    for was, device in zip(before, after, strict=True):
        if device.status:
            kept = was.status and was.status[0] == device.status[0]
            result[device.number] = (*device.status, 100 if kept else device.history.index(device.status[0]))
    return result
