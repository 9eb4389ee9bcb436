"""The nightly run creates days in advance, and archives, verifies and drops old days; each step may fail alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date, timedelta

import pytest

from nexhb import config, partitions, retirement
from nexhb.archive import catalog, export, restore, verify
from nexhb.archive.file import FolderStore
from nexhb.archive.manifest import COLUMNS
from nexhb.archive.opening import open_store
from nexhb.errors import LockLost, StoreError
from nexhb.jobs import nightly, runner
from tests.support.nightly import NOW, OLD, House

POINTS = ("detached", "sealed", "object stored", "manifest stored", "verified", "recorded", "dropped")


async def test_an_old_day_is_archived_verified_dropped_and_restored_equal_row_by_row(house: House) -> None:
    await house.fill(OLD)
    before = await house.rows(OLD)
    assert len(before) == 150

    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["archived"] == run.counts["dropped"] == run.counts["drilled"] == 1
    state = await house.state(OLD)
    assert (state["state"], state["row_count"]) == ("dropped", 150)
    assert not await partitions.table_exists(house.conn, partitions.table_name(OLD))

    [archived] = await catalog.find(house.conn, OLD)
    manifest = await verify.verify(house.store, house.store.name_of(archived.url), archived.sha256)
    assert (manifest.rows, manifest.min_ts, manifest.max_ts) == (150, before[0]["ts"], max(r["ts"] for r in before))

    assert await restore.restore_day(house.conn, house.store, [archived], NOW) == 150
    assert await house.rows(OLD) == before
    assert (await house.nightly()).status == "completed"
    assert await house.rows(OLD) == before  # a restored day is kept until it is released

    await catalog.release(house.conn, OLD)
    house.store.puts.clear()
    assert (await house.nightly()).counts["dropped"] == 1
    assert house.store.puts == []  # the same rows give the same bytes under the same names


@pytest.mark.usefixtures("no_days")
async def test_days_ahead_are_created_and_a_second_run_creates_none(house: House) -> None:
    assert (await house.nightly()).counts["created"] == 22
    assert "created" not in (await house.nightly()).counts
    assert len(await partitions.attached(house.conn)) == 22


@pytest.mark.usefixtures("no_days")
async def test_a_dry_run_prints_the_plan_and_changes_nothing(house: House) -> None:
    await house.fill(OLD)
    run = await runner.run(house.database, nightly.dry_run_job(house.context()), NOW)
    kinds = {(step["step"], step["target"]) for step in run.counts["plan"]}
    assert {
        ("archive", partitions.table_name(OLD)),
        ("drop", partitions.table_name(OLD)),
        ("create", "2026-06-15"),
    } <= kinds
    assert all(step["reason"] for step in run.counts["plan"])
    assert len(await partitions.attached(house.conn)) == 1
    assert (await house.state(OLD))["state"] == "active"
    assert await house.conn.fetchval("SELECT count(*) FROM job_runs") == 0
    assert not (house.folder / "archive").exists()


@pytest.mark.parametrize("point", POINTS)
async def test_a_run_killed_at_any_point_is_finished_by_the_next(house: House, point: str) -> None:
    await house.fill(OLD)
    before = await house.rows(OLD)
    await house.killed_at(point)
    (house.folder / "spool").mkdir(exist_ok=True)
    (house.folder / "spool" / "object-left").write_bytes(b"what a killed run leaves")
    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert (await house.state(OLD))["state"] == "dropped"
    assert len(await house.archived(OLD)) == len(before)
    assert len(await catalog.current_archives(house.conn)) == 1
    assert list((house.folder / "spool").iterdir()) == []
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    assert await house.rows(OLD) == before


@pytest.mark.parametrize("what", ["day-0000", "manifest"])
async def test_a_failing_store_keeps_the_table_and_the_reason_until_it_works_again(house: House, what: str) -> None:
    other = OLD - timedelta(days=1)
    await house.fill(OLD)
    await house.fill(other)
    house.store.refuse = f"{OLD:%Y%m%d}/day-" if what == "day-0000" else f"{OLD:%Y%m%d}/day-manifest"
    run = await house.nightly()
    assert run.status == "failed"
    assert f"archive {partitions.table_name(OLD)}" in run.reason
    assert "The disk is full." in run.reason
    state = await house.state(OLD)
    assert (state["state"], state["failed_at"]) == ("archive_failed", NOW)
    assert "The disk is full." in state["reason"]
    assert await partitions.table_exists(house.conn, partitions.table_name(OLD))
    assert (await house.state(other))["state"] == "dropped"  # a day's failure does not affect the others
    assert run.counts["created"] > 0
    house.store.refuse = ""
    assert (await house.nightly()).status == "completed"
    assert dict(await house.state(OLD)) | {"reason": None} == dict(await house.state(OLD))
    assert (await house.state(OLD))["state"] == "dropped"


def flip(_name: str, chunk: bytes) -> bytes:
    """Return the chunk with one bit in its middle flipped."""
    return chunk[: len(chunk) // 2] + bytes([chunk[len(chunk) // 2] ^ 1]) + chunk[len(chunk) // 2 + 1 :]


ROT: dict[str, Callable[[str, bytes], bytes]] = {
    "a flipped bit": flip,
    "cut short": lambda _name, chunk: chunk[:-1],
    "nothing at all": lambda _name, _chunk: b"",
    "something behind it": lambda _name, chunk: chunk + b"x",
    "twice": lambda _name, chunk: chunk + chunk,
}


@pytest.mark.parametrize("rot", ROT)
@pytest.mark.parametrize("what", ["manifest", ".csv.zst"])
async def test_a_day_whose_archive_reads_back_differently_is_never_dropped(house: House, rot: str, what: str) -> None:
    await house.fill(OLD)
    house.store.rot = lambda name, chunk: ROT[rot](name, chunk) if what in name else chunk
    run = await house.nightly()
    assert (run.status, (await house.state(OLD))["state"]) == ("failed", "archive_failed")
    assert await partitions.count_rows(house.conn, partitions.table_name(OLD)) == 150
    house.store.rot = lambda _name, chunk: chunk
    assert (await house.nightly()).status == "completed"
    assert (await house.state(OLD))["state"] == "dropped"


async def test_a_corrupt_object_in_the_store_is_replaced_by_the_next_run(house: House) -> None:
    await house.fill(OLD)
    await house.killed_at("manifest stored")
    for path in (house.folder / "archive").rglob("*.*"):
        path.write_bytes(flip("", path.read_bytes()))
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 150


async def test_an_archive_that_is_damaged_before_the_drop_keeps_the_table(house: House) -> None:
    await house.fill(OLD)
    await house.killed_at("recorded")
    [path] = (house.folder / "archive").rglob("*.zst")
    path.write_bytes(flip("", path.read_bytes()))
    run = await house.nightly()
    assert (run.status, (await house.state(OLD))["state"]) == ("failed", "archive_failed")
    assert await partitions.count_rows(house.conn, partitions.table_name(OLD)) == 150
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 150


async def test_a_table_with_other_rows_than_its_archive_is_not_dropped(house: House) -> None:
    await house.fill(OLD)
    await house.killed_at("recorded")
    await house.conn.execute(f"DELETE FROM {partitions.table_name(OLD)} WHERE uptime_s = 7")
    run = await house.nightly()
    assert "147 rows, its archive 150" in run.reason
    assert await partitions.table_exists(house.conn, partitions.table_name(OLD))


async def test_a_lock_that_was_lost_stops_the_drop(house: House) -> None:
    await house.fill(OLD)
    await house.killed_at("recorded")
    with pytest.raises(LockLost):
        await retirement.drop(house.conn, partitions.table_name(OLD), NOW)
    assert await partitions.table_exists(house.conn, partitions.table_name(OLD))


async def test_a_day_is_cut_into_objects_and_read_as_one(house: House) -> None:
    await house.fill(OLD, devices=40, rows=700)
    before = await house.rows(OLD)
    name = partitions.table_name(OLD)
    source = export.ArchivedTable(
        name, "day", name, partitions.midnight(OLD), partitions.midnight(OLD) + timedelta(days=1)
    )
    cut = await export.export(house.conn, source, house.store, house.folder / "spool", object_bytes=20_000)
    whole = await export.export(house.conn, source, house.store, house.folder / "spool")
    assert len(cut.manifest.objects) > 2
    assert len(whole.manifest.objects) == 1
    assert cut.manifest.stream_sha256 == whole.manifest.stream_sha256
    assert len({one.name for one in cut.manifest.objects}) == len(cut.manifest.objects)
    rows = [row async for piece in verify.rows(house.store, cut.manifest) for row in piece]
    assert len(rows) == len(before) == 28_000
    assert [row[0] for row in rows] == [row["device_id"] for row in before]
    assert {row[COLUMNS.index("ssid")] for row in rows} == {'a "quoted",\nname', ""}


async def test_the_same_rows_give_the_same_bytes_whatever_their_physical_order(house: House) -> None:
    await house.fill(OLD)
    name = partitions.table_name(OLD)
    source = export.ArchivedTable(
        name, "day", name, partitions.midnight(OLD), partitions.midnight(OLD) + timedelta(days=1)
    )
    first = await export.export(house.conn, source, house.store, house.folder / "spool")
    # This changes the physical order of the rows.
    await house.conn.execute(f"UPDATE {name} SET uptime_s = uptime_s WHERE device_no = 1")
    await house.conn.execute(f"VACUUM FULL {name}")
    await house.conn.execute("SET timezone = 'Asia/Kolkata'; SET datestyle = 'German'; SET extra_float_digits = -5")
    house.store.puts.clear()
    assert await export.export(house.conn, source, house.store, house.folder / "spool") == first
    assert house.store.puts == []


async def test_every_column_of_the_history_is_archived(house: House) -> None:
    """The archive of NexMDM's public server contained 9 of 14 columns."""
    columns = await house.conn.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'heartbeat_history'::regclass AND attnum > 0"
    )
    assert {row["attname"] for row in columns} == set(COLUMNS)


async def test_of_two_concurrent_runs_one_is_skipped_with_lock_held(house: House) -> None:
    await house.fill(OLD)
    runs = await asyncio.gather(*(house.nightly() for _ in range(4)))
    assert sorted((run.status, run.reason) for run in runs) == [("completed", ""), *[("skipped", "lock_held")] * 3]
    rows = await house.conn.fetch("SELECT status, reason FROM job_runs ORDER BY status")
    assert [tuple(row) for row in rows] == [("completed", None), *[("skipped", "lock_held")] * 3]


async def test_a_reader_that_holds_the_parent_is_named_and_the_next_run_finishes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 200)
    monkeypatch.setattr(partitions, "ATTEMPTS", 2)
    await house.fill(OLD)
    await house.fill(OLD - timedelta(days=1))
    reader = await house.database.connect(application="a long report")
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM device_heartbeats")
    await asyncio.sleep(1.1)  # the message names a transaction once it is a second old
    run = await house.nightly()
    assert run.status == "failed"
    assert "a long report" in run.reason
    assert run.counts["created"] > 0  # readers do not block ATTACH
    pending = [
        p.detach_pending for p in await partitions.attached(house.conn) if p.end.date() <= OLD + timedelta(days=1)
    ]
    assert sorted(pending) == [False, True]
    await reader.execute("COMMIT")
    await reader.close()
    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["dropped"] == 2


async def test_a_partition_with_unusual_bounds_does_not_stop_the_run(house: House) -> None:
    await house.fill(OLD)
    await house.conn.execute(
        """CREATE TABLE "Odd ""one" (LIKE device_heartbeats INCLUDING ALL);
           CREATE UNIQUE INDEX ON "Odd ""one" (device_no, bucket);
           ALTER TABLE device_heartbeats ATTACH PARTITION "Odd ""one" FOR VALUES FROM ('2025-01-01') TO ('2025-02-01');
           CREATE TABLE endless (LIKE device_heartbeats INCLUDING ALL);
           ALTER TABLE device_heartbeats ATTACH PARTITION endless FOR VALUES FROM (MINVALUE) TO ('2020-01-01')"""
    )
    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")
    assert run.counts["adopted"] == 1
    assert (await house.state(OLD))["state"] == "dropped"
    assert (await house.state(date(2025, 1, 1)))["state"] == "dropped"


async def test_a_drill_that_restores_something_else_fails_the_run(house: House) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).counts["drilled"] == 1
    assert (await house.state(OLD))["drilled_at"] == NOW
    [path] = (house.folder / "archive").rglob("*.zst")
    path.write_bytes(flip("", path.read_bytes()))
    run = await house.nightly(NOW + timedelta(days=1))
    assert run.status == "failed"
    assert "drill" in run.reason
    assert (await house.state(OLD))["drilled_at"] == NOW


@pytest.mark.usefixtures("no_days")
async def test_closed_days_are_frozen_once_and_counted_until_no_more_heartbeats_are_accepted(house: House) -> None:
    closed, open_ = NOW.date() - timedelta(days=8), NOW.date() - timedelta(days=2)
    await house.fill(closed)
    await house.fill(open_)
    first = await house.nightly()
    assert first.counts["frozen"] == 1
    assert [(await house.state(day))["row_count"] for day in (closed, open_)] == [150, 150]
    assert (await house.state(closed))["bytes_size"] > 8192
    unfrozen = await house.conn.fetchval(
        "SELECT count(*) FROM pg_class WHERE relname = $1 AND NOT relallvisible = relpages",
        partitions.table_name(closed),
    )
    assert unfrozen == 0
    assert "frozen" not in (await house.nightly(NOW + timedelta(hours=1))).counts


async def test_a_device_silent_for_longer_than_the_retention_is_inactive(house: House) -> None:
    await house.fill(NOW.date(), devices=2)
    await house.conn.execute(
        """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, status)
           VALUES (1, 'device 1', $1, $1, $1, 'ok'), (2, 'device 2', $2, $2, $2, 'ok'),
                  (3, 'device 3', $1, $1, $1, 'revoked')""",
        NOW - timedelta(days=90, minutes=1),
        NOW - timedelta(days=90),
    )
    assert (await house.nightly()).counts["inactivated"] == 1
    rows = await house.conn.fetch("SELECT status FROM device_last_status ORDER BY device_no")
    assert [row["status"] for row in rows] == ["inactive", "ok", "revoked"]


async def test_archives_in_an_earlier_store_are_read_where_they_were_written(house: House) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    settings = config.ArchiveSettings()
    async with open_store(f"file://{house.folder}/another", settings) as store:
        [archived] = await catalog.find(house.conn, OLD)
        assert (await verify.verify(store, store.name_of(archived.url), archived.sha256)).rows == 150
        assert await restore.restore_day(house.conn, store, [archived], NOW) == 150
        moved = FolderStore(house.folder / "archive" / "elsewhere", timeout_s=5)
        with pytest.raises(StoreError):
            await verify.verify(moved, moved.name_of(archived.url), archived.sha256)


async def test_a_restored_days_old_archive_is_neither_drilled_nor_verified(house: House) -> None:
    await house.fill(OLD)
    await house.nightly()
    archives = await catalog.find(house.conn, OLD)
    await restore.restore_day(house.conn, house.store, archives, NOW)
    for path in (house.folder / "archive").rglob("*.zst"):
        path.write_bytes(b"rotten since")
    run = await house.nightly()
    assert (run.status, run.reason) == ("completed", "")  # the day's rows are in the table, so nothing is lost
    await catalog.release(house.conn, OLD)
    run = await house.nightly()
    assert (run.status, run.counts["archived"], run.counts["drilled"]) == ("completed", 1, 1)
    assert len(await catalog.current_archives(house.conn)) == 1
