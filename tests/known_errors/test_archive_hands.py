"""Found by somebody whose task was to break the archive: what operators' own SQL and rows of hb_partitions that are not
true did to days and their archives."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from nexhb import partitions
from nexhb.archive import catalog, export, restore
from nexhb.db import Connection, Database
from nexhb.errors import BadInput
from tests.conftest import ADMIN_KEY, Nexhb
from tests.integration.test_nightly import NOW, OLD, House

NAME = partitions.name_of(OLD)
START = partitions.midnight(OLD)


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


async def archived_with_a_supplement(house: House) -> None:
    """OLD archived and dropped, and one late heartbeat behind it."""
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
    """A restore forgot the day's supplements at once, their rows being in the table now.

    `archive get`, `verify` and `--into` were without them from then on, and once the restored table was dropped by hand
    ("it is archived anyway") nothing knew of those rows any more.
    """
    await archived_with_a_supplement(house)
    for _ in range(2):
        assert await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW) == 151
        assert len(await house.archived(OLD)) == 151
        assert await partitions.gone(house.conn, OLD) == "detached"  # what a writer would hear were it not attached
        await house.conn.execute(f"DROP TABLE {NAME}")
        assert await partitions.gone(house.conn, OLD) == "dropped"
        assert (await house.nightly()).status == "completed"
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 151
    assert len(await catalog.find(house.conn, OLD)) == 1


async def test_a_released_day_on_its_way_out_comes_back_as_it_is(house: House) -> None:
    """Its table has the rows of its supplements already: brought in once more they would stand twice.

    What was said of it, besides, was "0 rows".
    """
    await archived_with_a_supplement(house)
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    await house.killed_at("sealed")
    assert await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW) == 151
    assert len(await house.rows(OLD)) == 151


async def test_a_wrong_row_of_hb_partitions_sends_no_young_day_away(house: House) -> None:
    """The plan took a day's age from hb_partitions.

    Today's partition, written there with bounds of last year (made again by hand under an old name), was archived and
    dropped. Bounds are the catalog's.
    """
    today = NOW.date()
    await house.fill(today)
    await house.conn.execute(
        "UPDATE hb_partitions SET range_start = '2025-01-01Z', range_end = '2025-01-02Z' WHERE partition_name = $1",
        partitions.name_of(today),
    )
    assert (await house.nightly()).counts["adopted"] == 1
    assert len(await house.rows(today)) == 150
    assert (await house.state(today))["state"] == "active"
    assert "adopted" not in (await house.nightly()).counts


async def test_a_table_attached_in_the_place_of_an_archived_day_does_not_replace_its_archive(house: House) -> None:
    """A dropped day, made again by hand, was archived again.

    hb_partitions then named the archive of the new table, here an empty one; 150 archived rows had no name any more.
    """
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await house.conn.execute(partitions.create_statement(NAME))
    await house.conn.execute(partitions.attach_statement(NAME, START, START + timedelta(days=1)))
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 150
    assert (await house.state(OLD))["row_count"] == 150  # the archive's, not the table's
    assert await partitions.present(house.conn, NAME)


async def test_somebodys_table_of_a_dropped_days_name_is_not_taken_for_the_day(house: House) -> None:
    """`archive restore` attached whatever had the day's name, instead of the archive's rows, and called it restored.

    Released, it would have replaced the archive. Late heartbeats of the day waited for ever, too.
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
async def test_rows_that_came_into_an_archived_day_by_hand_are_not_dropped(house: House, noticed: bool) -> None:
    """An archived day whose table was still there was attached, unsealed, changed and detached by hand.

    Where a nightly run came in between, it counted the rows, and the next one found the count that it dropped by: ten
    rows were lost. Where none came, a change that left the count as it was would have been.
    """
    day = NOW.date() - timedelta(days=3)
    name, start = partitions.name_of(day), partitions.midnight(day)
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


async def test_a_sealed_day_attached_by_hand_stops_no_heartbeat(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """A day that the nightly run had sealed was attached again by hand.

    One heartbeat of that day was refused by the seal for 6 s, then the intake was closed, for every device. Now it is a
    late one, and the next nightly run opens the day again.
    """
    agent, made = await nexhb.agent(), now - timedelta(days=2)
    assert (await agent.send(made)).status == 200
    name, start = partitions.name_of(made.date()), partitions.midnight(made.date())
    await partitions.detach(conn, name)
    await partitions.seal(conn, name, start, start + timedelta(days=1))
    await conn.execute(partitions.attach_statement(name, start, start + timedelta(days=1)))
    assert (await agent.send(made + timedelta(minutes=1))).status == 200
    async with nexhb.http.post(f"{nexhb.url}/ops/nightly", headers={"x-admin": ADMIN_KEY}) as response:
        body = await response.json()
    assert (response.status, body["adopted"], body["late_merged"]) == (200, 1, 1)
    assert (await agent.send(made + timedelta(minutes=2))).status == 200
    assert await partitions.count(conn, name) == 3


@pytest.mark.parametrize("bounds", ["('2027-01-01') TO ('infinity')", "(MINVALUE) TO ('0044-03-15 BC')"])
async def test_a_partition_whose_bounds_are_no_times_of_ours_stops_nothing(house: House, bounds: str) -> None:
    """A catch-all to infinity, or one of a year BC, made every look into the catalog raise ValueError.

    No day was made, no nightly run went on, no daemon started. They are left alone, as MINVALUE is; also where
    hb_partitions has a row of that name, by which they were detached, archived and dropped.
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
    """No error: a COPY that is broken off in its middle leaves the run's connection, and with it the lock, usable.

    Tried because a cancelled COPY could have cancelled the next statement instead.
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
    """Somebody's own name of a partition: as long as PostgreSQL takes, or none that a folder may have.

    The seal's name was cut, and its writers' errors were not known for what they are; a slash made the archive's
    objects lie elsewhere than its manifest said. Such a day was kept, and failed every night.
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
