"""If the archive store is not the one that the database expects, a nightly run stores nothing in it and drops no
day."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb import partitions
from nexhb.archive import adopt, marker
from nexhb.archive.adopt import AdoptOptions
from nexhb.archive.opening import open_store
from nexhb.config import ArchiveSettings, Settings
from nexhb.doctor import checks
from nexhb.errors import BadInput
from nexhb.jobs import nightly, runner
from tests.limited_s3 import limited_s3
from tests.support.nightly import NOW, OLD, House
from tests.support.nightly_s3 import Bucket

OLDER = OLD - timedelta(days=1)


async def one_day_archived(house: House) -> Path:
    """Archive the day OLDER, and return the archive's folder. The next day is due too, but not archived yet."""
    await house.fill(OLDER)
    assert (await house.nightly()).counts["dropped"] == 1
    await house.fill(OLD)
    return house.folder / "archive"


async def assert_nothing_stored(house: House, says: str) -> None:
    """Assert that a run fails, and stores and drops nothing."""
    house.store.puts.clear()
    run = await house.nightly()
    state = await house.state(OLD)
    assert (run.status, state["state"], says in state["reason"]) == ("failed", "archive_failed", True), state["reason"]
    assert "nexhb archive adopt" in state["reason"]
    assert await partitions.count_rows(house.conn, partitions.table_name(OLD)) == 150
    assert house.store.puts == []


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "what another disk has"])
async def test_nothing_is_stored_in_a_folder_that_is_not_mounted(house: House, there: str) -> None:
    """Formerly, while the archive's disk was not mounted, nexhb created the folder on the root disk, and every old day
    was archived there and dropped."""
    folder = await one_day_archived(house)
    mounted = folder.rename(house.folder / "the disk")
    if there != "nothing":
        folder.mkdir()
    if there == "what another disk has":
        (folder / "nexhb-archive-0123456789abcdef").write_bytes(marker.CONTENT)
    await assert_nothing_stored(house, "lacks the marker nexhb-archive-")
    assert folder.exists() == (there != "nothing")
    settings = Settings(data_dir=house.folder)
    lines = {line.name: line for line in await checks.run_checks(house.conn, settings, NOW)}
    assert (lines["archive store"].passed, "lacks the marker" in lines["archive store"].detail) == (False, True)

    shutil.rmtree(folder, ignore_errors=True)
    mounted.rename(folder)
    assert (await house.nightly()).counts["dropped"] == 1
    lines = {line.name: line for line in await checks.run_checks(house.conn, settings, NOW)}
    assert lines["archive store"].passed


async def test_a_folder_that_disappears_before_the_drop_keeps_the_table(house: House) -> None:
    await one_day_archived(house)

    def unmounted(point: str) -> None:
        if point == "recorded":
            (house.folder / "archive").rename(house.folder / "the disk")

    house.at = unmounted
    run = await house.nightly()
    assert (run.status, (await house.state(OLD))["state"]) == ("failed", "archive_failed")
    assert await partitions.count_rows(house.conn, partitions.table_name(OLD)) == 150


async def test_an_older_installation_gets_a_marker_if_one_of_its_archives_exists(house: House) -> None:
    folder = await one_day_archived(house)
    await house.conn.execute("DELETE FROM archive_markers")
    [path] = folder.glob("nexhb-archive-*")
    path.unlink()
    mounted = folder.rename(house.folder / "the disk")
    await assert_nothing_stored(house, "has none of the last 1 archives")
    mounted.rename(folder)
    assert (await house.nightly()).status == "completed"
    assert len(list(folder.glob("nexhb-archive-*"))) == 1


async def test_adopt_accepts_an_archive_that_was_moved(house: House) -> None:
    folder = await one_day_archived(house)
    [path] = folder.glob("nexhb-archive-*")
    path.unlink()
    await assert_nothing_stored(house, "lacks the marker")
    report = await adopt.adopt(house.conn, house.store.store, house.folder / "spool", NOW, options=AdoptOptions())
    assert (report.marked, report.known, report.is_clean) == (True, 1, True)
    assert (await house.nightly()).status == "completed"

    shutil.rmtree(folder)
    await house.fill(OLD - timedelta(days=2))
    spool = house.folder / "spool"
    with pytest.raises(BadInput, match="none of the 2 archives"):
        await adopt.adopt(house.conn, house.store.store, spool, NOW, options=AdoptOptions())
    assert not folder.exists()
    assert (await adopt.adopt(house.conn, house.store.store, spool, NOW, options=AdoptOptions(force=True))).marked
    assert (await house.nightly()).counts["archived"] == 1


async def test_nothing_is_stored_in_an_emptied_bucket_whatever_headers_it_supports(
    house: House, aws: pytest.MonkeyPatch
) -> None:
    """With a wrong endpoint or prefix, a bucket looks like a bucket that was emptied."""
    aws.setenv("AWS_ACCESS_KEY_ID", "key")
    aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    refuses = {"x-amz-checksum-sha256": (400, "InvalidArgument"), "If-None-Match": (501, "NotImplemented")}
    async with limited_s3(**refuses) as server:
        archive = ArchiveSettings(url="s3://bucket/nexhb", endpoint_url=server.url, region="us-east-1")
        bucket = Bucket(house.database, house.conn, house.folder, archive)
        await bucket.fill(OLDER)
        assert (await bucket.nightly_s3()).counts["dropped"] == 1
        async with open_store(str(archive.url), archive) as store:
            names = await adopt.object_names(store, 100)
            assert len(names) == 3
            assert await adopt.object_names(store, 2) < names
        await bucket.fill(OLD)
        kept = dict(server.objects)
        server.objects.clear()
        run = await runner.run(bucket.database, nightly.nightly_job(bucket.context()), NOW)
        assert (run.status, "lacks the marker" in run.reason) == ("failed", True)
        assert server.objects == {}
        server.objects.update(kept)
        assert (await bucket.nightly_s3()).counts["dropped"] == 1
