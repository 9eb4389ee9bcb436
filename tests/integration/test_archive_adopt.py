"""`archive adopt` records a store's archives in a catalog that lacks them, and overwrites no entry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nexhb import partitions
from nexhb.archive import adopt, catalog, restore
from nexhb.archive.adopt import AdoptOptions, AdoptReport
from nexhb.archive.catalog import Archived
from nexhb.archive.file import FolderStore
from nexhb.archive.manifest import decode, encode, manifest_name
from nexhb.audit import audit
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.doctor.check import CheckResult
from nexhb.errors import BadInput
from tests.support.nightly import NOW, OLD, House

NAME = partitions.table_name(OLD)
LATE = """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
    SELECT $1::timestamptz + interval '20 hours', $1, device_no,
           extract(epoch FROM $1::timestamptz)::int - 1577836800 + $3, 1, false, 'dropped'
    FROM devices WHERE device_id = $2"""


async def new_database(house: House) -> None:
    """Make the database like a new one, in which devices have other numbers; the store keeps its archives."""
    await house.conn.execute(
        """DELETE FROM archive_supplements; DELETE FROM hb_partitions WHERE archive_url IS NOT NULL;
           DELETE FROM archive_markers; DELETE FROM archive_superseded; DELETE FROM ingest_ledger;
           DELETE FROM devices; DELETE FROM heartbeat_labels;
           INSERT INTO devices (device_id) VALUES ('device 3'), ('somebody else'), ('device 1')"""
    )


async def adopted(house: House, **options: Any) -> AdoptReport:
    """Adopt the store's archives."""
    return await adopt.adopt(
        house.conn, house.store.store, house.folder / "spool", NOW, options=AdoptOptions(**options)
    )


async def line(house: House) -> CheckResult:
    """Return the doctor's result for the archive store."""
    lines = await checks.run_checks(house.conn, Settings(data_dir=house.folder), NOW)
    return next(line for line in lines if line.name == "archive store")


async def with_a_supplement(house: House) -> list[Any]:
    """Archive the day OLD, and then two late heartbeats of that day. Return every archived row, by device_id."""
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await house.conn.execute(LATE, partitions.midnight(OLD), "device 1", 72_000)
    await house.conn.execute(LATE, partitions.midnight(OLD), "device 2", 72_000)
    assert (await house.nightly()).counts["late_archived"] == 2
    return await house.archived(OLD)


async def test_a_new_database_adopts_the_archives_of_the_store(house: House) -> None:
    """Formerly, with a new or an older database, `archive list` was empty although the store was full.

    Devices are mapped by device_id, because the numbers of the old database belong to other devices here.
    """
    before = await with_a_supplement(house)
    assert (await line(house)).passed
    await new_database(house)
    check = await line(house)
    assert (check.passed, "2 archives belong to days that are missing from" in check.detail) == (False, True)
    planned = await adopted(house, dry_run=True)
    assert [one["kind"] for one in planned.adopted] == ["day", "late"]
    assert await catalog.current_archives(house.conn) == []

    report = await adopted(house)
    assert [(one["kind"], one["rows"]) for one in report.adopted] == [("day", 150), ("late", 2)]
    assert (report.is_clean, report.marked) == (True, True)
    assert (await line(house)).passed
    assert (await adopted(house)).known == 2
    assert [row["verified_at"] for row in await catalog.list_archives(house.conn)] == [None, None]
    audited = await audit(house.conn, OLD)
    assert (audited.written, audited.missing) == (152, 0)
    assert await house.archived(OLD) == before
    archives = await catalog.find(house.conn, OLD)
    assert await restore.restore_day(house.conn, house.store, archives, NOW) == 152
    rows = await house.rows(OLD)
    count: dict[str, int] = {}
    for row in rows:
        count[row["device_id"]] = count.get(row["device_id"], 0) + 1
    assert count == {"device 1": 51, "device 2": 51, "device 3": 50}


async def test_a_late_heartbeat_for_an_adopted_day_is_identified_by_device_id_not_by_number(house: House) -> None:
    """Formerly, the late heartbeat was mistaken for an archived one with the same device number, and discarded."""
    await with_a_supplement(house)
    await new_database(house)
    await adopted(house, verify=True)
    [first, *_] = await house.archived(OLD)
    bucket = int(first[-1]) - (int(partitions.midnight(OLD).timestamp()) - 1_577_836_800)
    await house.conn.execute("INSERT INTO heartbeat_labels OVERRIDING SYSTEM VALUE VALUES (1, '', '', '', '')")
    await house.conn.execute(
        "INSERT INTO devices (device_no, device_id) OVERRIDING SYSTEM VALUE VALUES ($1, 'a new one')", int(first[-2])
    )
    for device_id in ("a new one", "device 1"):  # "a new one" has the number that device 1 has in the archive
        await house.conn.execute(LATE, partitions.midnight(OLD), device_id, bucket)
    assert (await house.nightly()).counts["late_archived"] == 1
    assert await house.conn.fetchval("SELECT count(*) FROM late_heartbeats") == 0
    assert [row[0] for row in await house.archived(OLD)].count("a new one") == 1


async def test_an_older_database_gets_the_supplement_that_it_lacks_and_no_row_twice(house: House) -> None:
    await with_a_supplement(house)
    await house.conn.execute("DELETE FROM archive_supplements")
    assert [one["kind"] for one in (await adopted(house)).adopted] == ["late"]
    # The archive of a day that was restored and archived again contains the supplement's rows.
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 152
    assert (await line(house)).passed
    assert (await adopted(house)).known == 3
    await house.conn.execute("DELETE FROM archive_superseded")
    report = await adopted(house)
    assert [one["kind"] for one in report.superseded] == ["late"]
    assert [one["kind"] for one in report.conflicts] == ["day"]
    assert len(await house.archived(OLD)) == 152


async def archived_twice_and_forgotten(house: House) -> Archived:
    """Restore a day and archive it again: the store has both archives and a supplement, the catalog none of them.
    Return the newer archive."""
    await with_a_supplement(house)
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    assert (await house.nightly()).status == "completed"
    [current] = await catalog.find(house.conn, OLD)
    await new_database(house)
    return current


async def test_several_archives_of_one_day_wait_for_the_operators_decision(house: House) -> None:
    current = await archived_twice_and_forgotten(house)
    report = await adopted(house)
    assert len(report.conflicts) == 3
    assert "there are 2 archives of that day" in report.conflicts[0]["reason"]
    assert await catalog.current_archives(house.conn) == []
    report = await adopted(house, chosen=frozenset({current.url}))
    assert ([one["url"] for one in report.adopted], len(report.superseded), report.is_clean) == ([current.url], 2, True)
    assert (await line(house)).passed
    assert len(await house.archived(OLD)) == 152


async def test_another_archive_of_a_known_day_is_reported_and_changes_nothing(house: House) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    [known] = await catalog.find(house.conn, OLD)
    name = house.store.name_of(known.url)
    other = msgspec.structs.replace(decode((house.folder / "archive" / name).read_bytes()), schema_version=1)
    await put(house.store.store, house.folder, encode(other))
    check = await line(house)
    assert (check.passed, "1 differ from the catalog's archive of the same day" in check.detail) == (False, True)
    [conflict] = (await adopted(house)).conflicts
    assert known.url in conflict["reason"]
    assert await catalog.find(house.conn, OLD) == [known]
    assert (await adopted(house, chosen=frozenset({known.url}))).is_clean
    assert (await line(house)).passed


async def put(store: FolderStore, folder: Path, raw: bytes, name: str = "") -> str:
    """Put a manifest into the store."""
    sha256 = hashlib.sha256(raw)
    name = name or manifest_name(NAME, "day", sha256.hexdigest())
    (folder / "raw").write_bytes(raw)
    await store.put(name, folder / "raw", sha256.digest())
    return name


Spoil = Callable[[House, dict[str, Any]], Awaitable[None]]


async def of_today(house: House, manifest: dict[str, Any]) -> None:
    manifest |= {
        "range_start": f"{NOW:%Y-%m-%dT00:00:00Z}",
        "range_end": f"{NOW + timedelta(days=1):%Y-%m-%dT00:00:00Z}",
    }
    await put(house.store.store, house.folder, json.dumps(manifest).encode())


async def of_an_object_elsewhere(house: House, manifest: dict[str, Any]) -> None:
    manifest["objects"][0]["name"] = "../../etc/passwd"
    await put(house.store.store, house.folder, json.dumps(manifest).encode())


async def under_another_name(house: House, manifest: dict[str, Any]) -> None:
    await put(house.store.store, house.folder, json.dumps(manifest).encode(), f"{NAME}/day-manifest-{'0' * 16}.json")


async def of_another_folder(house: House, manifest: dict[str, Any]) -> None:
    raw = json.dumps(manifest).encode()
    name = manifest_name("another", "day", hashlib.sha256(raw).hexdigest())
    await put(house.store.store, house.folder, raw, name)


async def endless(house: House, manifest: dict[str, Any]) -> None:
    await put(house.store.store, house.folder, json.dumps(manifest | {"x": "x" * (1 << 20)}).encode())


async def nested(house: House, _manifest: dict[str, Any]) -> None:
    await put(house.store.store, house.folder, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize(
    "spoil", [of_today, of_an_object_elsewhere, under_another_name, of_another_folder, endless, nested]
)
async def test_a_manifest_that_is_not_what_nexhb_writes_is_refused(house: House, spoil: Spoil) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    [known] = await catalog.find(house.conn, OLD)
    path = house.folder / "archive" / house.store.name_of(known.url)
    manifest = json.loads(path.read_bytes())
    path.unlink()
    await new_database(house)
    await spoil(house, manifest)
    report = await adopted(house)
    assert (report.adopted, len(report.refused)) == ([], 1)
    assert await catalog.current_archives(house.conn) == []


async def test_a_damaged_archive_is_not_adopted_with_verify(house: House) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await new_database(house)
    [path] = (house.folder / "archive").rglob("*.zst")
    path.write_bytes(path.read_bytes()[:-1])
    report = await adopted(house, verify=True)
    assert (report.adopted, "is not what was stored" in report.refused[0]["reason"]) == ([], True)


async def test_the_archive_of_a_day_whose_table_exists_is_not_adopted(house: House) -> None:
    """The database was restored from a backup made before the day was archived: the nightly run archives the day
    again."""
    await house.fill(OLD)
    await house.killed_at("verified")
    assert (await line(house)).passed
    assert len((await adopted(house)).present) == 1
    assert (await house.nightly()).status == "completed"
    assert len(await house.archived(OLD)) == 150


async def test_a_dry_run_records_nothing(house: House) -> None:
    current = await archived_twice_and_forgotten(house)
    planned = await adopted(house, dry_run=True, chosen=frozenset({current.url}))
    assert (len(planned.adopted), len(planned.superseded)) == (1, 2)
    assert await house.conn.fetch(EVERY_TRACE) == []


EVERY_TRACE = """SELECT archive_url FROM hb_partitions WHERE archive_url IS NOT NULL UNION ALL
    SELECT archive_url FROM archive_supplements UNION ALL SELECT archive_url FROM archive_superseded UNION ALL
    SELECT marker FROM archive_markers"""


async def test_the_operator_may_choose_another_archive_later(house: House) -> None:
    """Once the other archive is chosen, the one that was chosen first becomes superseded; they are never both used."""
    await with_a_supplement(house)
    [first, *_] = await catalog.find(house.conn, OLD)
    await restore.restore_day(house.conn, house.store, await catalog.find(house.conn, OLD), NOW)
    await catalog.release(house.conn, OLD)
    assert (await house.nightly()).status == "completed"
    [second] = await catalog.find(house.conn, OLD)
    for taken in (first, second):
        await house.conn.execute(
            "DELETE FROM archive_supplements; DELETE FROM hb_partitions WHERE archive_url IS NOT NULL"
        )
        report = await adopted(house, chosen=frozenset({taken.url}))
        assert [one["url"] for one in report.adopted if one["kind"] == "day"] == [taken.url]
        superseded = await house.conn.fetch("SELECT archive_url FROM archive_superseded")
        assert taken.url not in [row["archive_url"] for row in superseded]


async def test_a_day_that_another_partition_overlaps_is_reported_and_not_adopted(house: House) -> None:
    """If such a day were adopted, its rows would be read twice: from the archive, and from the table that covers it."""
    await with_a_supplement(house)
    await new_database(house)
    await house.conn.execute(
        "INSERT INTO hb_partitions (partition_name, range_start, range_end, state) "
        "VALUES ('a_week', $1::timestamptz - interval '3 days', $1::timestamptz + interval '4 days', 'active')",
        partitions.midnight(OLD),
    )
    report = await adopted(house)
    assert (report.adopted, len(report.conflicts)) == ([], 2)
    assert all("a_week is in the database" in one["reason"] for one in report.conflicts)
    assert await catalog.current_archives(house.conn) == []


async def test_an_archive_that_was_copied_to_another_store_is_recognized(house: House) -> None:
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    (house.folder / "archive").rename(house.folder / "moved")
    moved = FolderStore(house.folder / "moved", timeout_s=30)
    report = await adopt.adopt(house.conn, moved, house.folder / "spool", NOW, options=AdoptOptions())
    assert (report.known, report.conflicts, report.adopted) == (1, [], [])


async def test_a_supplement_that_overlaps_the_archives_is_a_conflict_and_a_duplicate_is_superseded(
    house: House,
) -> None:
    """If the overlapping supplement were adopted, some rows would be in the day twice."""
    await with_a_supplement(house)
    for bucket, kept in ((72_000, "the same two rows, stored again"), (72_010, "one of them, and another")):
        await house.conn.execute("DELETE FROM archive_supplements")
        await house.conn.execute(LATE, partitions.midnight(OLD), "device 1", 72_000)
        await house.conn.execute(LATE, partitions.midnight(OLD), "device 2", bucket)
        await house.conn.execute("UPDATE late_heartbeats SET battery_pct = 1")  # another manifest
        assert (await house.nightly()).counts["late_archived"] == 2, kept
        [again] = await house.conn.fetch("SELECT archive_url FROM archive_supplements")
        (house.folder / "archive" / house.store.name_of(again["archive_url"])).rename(house.folder / f"{bucket}.json")
    await house.conn.execute("DELETE FROM archive_supplements")
    assert [one["kind"] for one in (await adopted(house)).adopted] == ["late"]
    for bucket, verdict in ((72_000, "superseded"), (72_010, "conflicts")):
        raw = (house.folder / f"{bucket}.json").read_bytes()
        name = manifest_name(NAME, "late", hashlib.sha256(raw).hexdigest())
        await put(house.store.store, house.folder, raw, name)
        report = await adopted(house)
        assert [one["url"] for one in getattr(report, verdict)] == [house.store.url(name)], report
    assert len(await house.archived(OLD)) == 152
    await house.conn.execute("DELETE FROM archive_supplements; DELETE FROM archive_superseded")
    assert len((await adopted(house)).adopted) == 1  # one of the three supplements
    keys = [(row[0], row[-1]) for row in await house.archived(OLD)]
    assert len(keys) == len(set(keys)) == 152


async def test_what_is_read_from_a_store_is_limited(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formerly, before `adopt` refused a store, it read all names in the store, and whole objects of any size if they
    were named like manifests."""
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await new_database(house)
    pieces: list[int] = []

    async def endless(_name: str) -> AsyncGenerator[bytes, None]:
        for number in range(50):
            pieces.append(number)
            yield b" " * (1 << 18)

    monkeypatch.setattr(house.store, "store", SimpleNamespace(names=house.store.store.names, get=endless,
                                                              put=house.store.store.put, url=house.store.store.url,
                                                              name_of=house.store.store.name_of))  # fmt: skip
    [refused] = (await adopted(house)).refused
    assert "larger than a manifest" in refused["reason"]
    assert len(pieces) == 5
    monkeypatch.undo()
    monkeypatch.setattr(adopt, "MAX_STORE_OBJECTS", 2)
    with pytest.raises(BadInput, match="more than 2 objects"):
        await adopted(house)
