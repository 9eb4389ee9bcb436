"""Effects of operators' own SQL, and of wrong rows in hb_partitions, on days and their archives. They were found by
trying to break the archive."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from nexhb import partitions, retirement
from nexhb.archive import catalog, export, restore
from nexhb.errors import BadInput
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, Nexhb
from tests.support.nightly import NOW, OLD, House

NAME = partitions.table_name(OLD)
START = partitions.midnight(OLD)


async def archived_with_a_supplement(house: House) -> None:
    """Archive and drop OLD, and then archive one late heartbeat."""
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await house.conn.execute(
        """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
           VALUES ($1::timestamptz + interval '20 hours', $1, 1,
                   extract(epoch FROM $1::timestamptz)::int - 1577836800 + 72000, 1, false, 'dropped')""",
        START,
    )
    assert (await house.nightly()).counts["late_archived"] == 1


async def test_a_restored_day_keeps_its_supplements_until_an_archive_has_their_rows(house: House) -> None:
    """Formerly, a restore deleted the records of the day's supplements at once, because their rows were in the table.

    `archive get`, `verify` and `--into` omitted these rows from then on, and after the restored table was dropped by
    hand ("it is archived anyway"), no record of them was left.
    """
    await archived_with_a_supplement(house)
    for _ in range(2):
        assert await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW) == 151
        assert len(await house.archived(OLD)) == 151
        # The reason that a writer would record if the partition were not attached.
        assert await partitions.reason_not_to_create(house.conn, OLD) == "detached"
        await house.conn.execute(f"DROP TABLE {NAME}")
        assert await partitions.reason_not_to_create(house.conn, OLD) == "dropped"
        assert (await house.nightly()).status == "completed"
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 151
    assert len(await catalog.find(house.conn, OLD)) == 1


async def test_a_released_day_that_is_detached_is_restored_as_it_is(house: House) -> None:
    """The day's table already has the rows of its supplements: if they were restored again, it would have them twice.

    Formerly, the output of such a restore was also "0 rows", which was wrong.
    """
    await archived_with_a_supplement(house)
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    await house.killed_at("sealed")
    assert await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW) == 151
    assert len(await house.rows(OLD)) == 151


async def test_a_wrong_row_of_hb_partitions_archives_no_young_day(house: House) -> None:
    """Formerly, the plan of a nightly run read a day's age from hb_partitions.

    If today's partition was created again by hand under an old name, it was recorded with bounds of last year, and so
    archived and dropped. The bounds now come from PostgreSQL's catalog.
    """
    today = NOW.date()
    await house.fill(today)
    await house.conn.execute(
        "UPDATE hb_partitions SET range_start = '2025-01-01Z', range_end = '2025-01-02Z' WHERE partition_name = $1",
        partitions.table_name(today),
    )
    assert (await house.nightly()).counts["adopted"] == 1
    assert len(await house.rows(today)) == 150
    assert (await house.state(today))["state"] == "active"
    assert "adopted" not in (await house.nightly()).counts


async def test_a_table_attached_in_place_of_an_archived_day_does_not_replace_its_archive(house: House) -> None:
    """Formerly, a dropped day whose table was created again by hand was archived again.

    hb_partitions then named the archive of the new table, here an empty one; nothing referred to 150 archived rows.
    """
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await house.conn.execute(partitions.create_statement(NAME))
    await house.conn.execute(partitions.attach_statement(NAME, START, START + timedelta(days=1)))
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 150
    assert (await house.state(OLD))["row_count"] == 150  # the row count of the archive, not of the table
    assert await partitions.table_exists(house.conn, NAME)


async def test_a_foreign_table_with_a_dropped_days_name_is_not_mistaken_for_the_day(house: House) -> None:
    """Formerly, `archive restore` attached any table with the day's name, instead of the archive's rows, and reported
    success.

    Once released, the table would have replaced the archive. Also, late heartbeats of the day were never archived.
    """
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await house.conn.execute(f"CREATE TABLE {NAME} (LIKE device_heartbeats)")
    with pytest.raises(BadInput, match="not the day's"):
        await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await house.conn.execute(
        """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
           VALUES ($1, $1, 1, 1, 1, false, 'dropped')""",
        START,
    )
    assert (await house.nightly()).counts["late_archived"] == 1


@pytest.mark.parametrize("noticed", [True, False])
async def test_rows_added_to_an_archived_day_by_hand_are_not_dropped(house: House, noticed: bool) -> None:
    """Formerly, rows were lost if an archived day whose table still existed was attached, unsealed, changed and
    detached by hand.

    If a nightly run happened before the detach, this run counted the rows, and the next nightly run dropped the table
    because the count matched: ten rows were lost. If no run happened before it, a change that kept the count would have
    been lost.
    """
    day = NOW.date() - timedelta(days=3)
    name, start = partitions.table_name(day), partitions.midnight(day)
    await house.fill(day)
    await house.conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {name}")
    await house.killed_at("recorded")
    await house.conn.execute(partitions.attach_statement(name, start, start + timedelta(days=1)))
    await house.conn.execute(f"ALTER TABLE {name} DROP CONSTRAINT {name}_sealed")
    await house.conn.execute(f"DELETE FROM {name} WHERE ctid IN (SELECT ctid FROM {name} LIMIT 10)")
    await house.conn.execute(
        f"""INSERT INTO {name} (ts, received_at, device_no, bucket, label_no, clock_wrong)
            SELECT ts, received_at, device_no, bucket + 1, label_no, false FROM {name} LIMIT 10"""
    )
    rows = len(await house.rows(day))
    if noticed:
        assert (await house.nightly()).status == "completed"
    await house.conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {name}")
    assert (await house.nightly()).counts["dropped"] == 1
    found = await house.archived(day)
    assert (len(found), sum(int(row[-1]) % 60 == 1 for row in found)) == (rows, 10)


async def test_a_sealed_day_attached_by_hand_blocks_no_heartbeat(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Formerly, if a day that the nightly run had sealed was attached again by hand, the seal rejected the next
    heartbeat of that day: the writer retried it for 6 s, and then closed the intake for every device.

    Now the heartbeat is stored as late, and the next nightly run unseals the day.
    """
    agent, made = await nexhb.agent(), now - timedelta(days=2)
    assert (await agent.send(made)).status == 200
    name, start = partitions.table_name(made.date()), partitions.midnight(made.date())
    await retirement.detach(conn, name)
    await retirement.seal(conn, name, start, start + timedelta(days=1))
    await conn.execute(partitions.attach_statement(name, start, start + timedelta(days=1)))
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    async with nexhb.http.post(f"{nexhb.url}/ops/nightly", headers={"x-admin": ADMIN_KEY}) as response:
        body = await response.json()
    assert (response.status, body["adopted"], body["late_merged"]) == (200, 1, 1)
    assert (await agent.send(made + timedelta(minutes=2))).status == 200
    assert await partitions.count_rows(conn, name) == 3


@pytest.mark.parametrize("bounds", ["('2027-01-01') TO ('infinity')", "(MINVALUE) TO ('0044-03-15 BC')"])
async def test_a_partition_with_unusual_bounds_does_not_stop_the_nightly_run(house: House, bounds: str) -> None:
    """Formerly, a partition up to infinity, or of a year BC, made every read of the catalog raise ValueError.

    No day was created, no nightly run finished, no daemon started. Now such partitions are skipped, like those with
    MINVALUE, even if hb_partitions has a row of that name. Formerly, if such a row existed for a partition with
    MINVALUE, the nightly run detached, archived and dropped the partition.
    """
    await house.conn.execute("CREATE TABLE endless (LIKE device_heartbeats INCLUDING ALL)")
    await house.conn.execute(f"ALTER TABLE device_heartbeats ATTACH PARTITION endless FOR VALUES FROM {bounds}")
    await house.conn.execute(
        """INSERT INTO hb_partitions (partition_name, range_start, range_end)
           VALUES ('endless', '2025-01-01Z', '2025-01-02Z')"""
    )
    await house.fill(OLD)
    run = await house.nightly()
    assert (run.status, run.counts["dropped"]) == ("completed", 1)
    assert await house.conn.fetchval("SELECT count(*) FROM pg_inherits WHERE inhrelid = 'endless'::regclass") == 1


async def test_a_spool_without_room_fails_the_day_and_leaves_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an aborted COPY, the run's connection is still usable, and still holds the lock.

    This test found no error: the cancellation of the COPY could have cancelled the next statement instead.
    """
    await house.fill(OLD, devices=100, rows=300)

    def full(_file: object, _piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export._Part, "write", full)
        run = await house.nightly()
    assert (run.counts["failed_steps"], (await house.state(OLD))["state"]) == (1, "archive_failed")
    assert run.counts["created"] > 0
    assert (await house.nightly()).counts["dropped"] == 1
    assert list((house.folder / "spool").iterdir()) == []


@pytest.mark.parametrize("name", ["p" * 63, "é" * 31, "a/b", "..", ".hidden/x"])
async def test_a_partition_may_have_any_name(house: House, name: str) -> None:
    """A partition that an operator named may have a name as long as PostgreSQL allows, or one that is not allowed for a
    folder.

    Formerly, the name of the seal was cut off, so that errors of writers were not recognized. If the partition's name
    had a slash, the archive's objects were not at the place that its manifest named. Such a day was kept, and its
    archiving failed every night.
    """
    await house.conn.execute(f"CREATE TABLE {partitions.quoted(name)} (LIKE device_heartbeats INCLUDING ALL)")
    await house.conn.execute(f"CREATE UNIQUE INDEX ON {partitions.quoted(name)} (device_no, bucket)")
    await house.conn.execute(partitions.attach_statement(name, START, START + timedelta(days=1)))
    await house.fill(OLD)
    before = await house.rows(OLD)
    await house.killed_at("recorded")
    assert (await house.nightly()).counts["dropped"] == 1
    assert len(await house.archived(OLD)) == 150
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    assert await house.rows(OLD) == before
