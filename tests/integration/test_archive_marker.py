"""A store that is not the one that the database knows gets nothing, and no day is dropped for it."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb import doctor, partitions
from nexhb.archive import adopt, marker
from nexhb.archive.adopt import Wishes
from nexhb.archive.store import open_store
from nexhb.config import Archive, Settings
from nexhb.db import Connection, Database
from nexhb.errors import BadInput
from nexhb.jobs import nightly, runner
from tests.integration.test_nightly import NOW, OLD, House
from tests.integration.test_nightly_s3 import Bucket
from tests.odd_s3 import odd_s3

OLDER = OLD - timedelta(days=1)


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


async def one_day_archived(house: House) -> Path:
    """OLDER is in the archive; the day after it is old, too, and waits. The folder."""
    await house.fill(OLDER)
    assert (await house.nightly()).counts["dropped"] == 1
    await house.fill(OLD)
    return house.folder / "archive"


async def nothing_left(house: House, says: str) -> None:
    """A run fails, and writes and drops nothing."""
    house.store.puts.clear()
    run = await house.nightly()
    state = await house.state(OLD)
    assert (run.status, state["state"], says in state["reason"]) == ("failed", "archive_failed", True), state["reason"]
    assert "nexhb archive adopt" in state["reason"]
    assert await partitions.count(house.conn, partitions.name_of(OLD)) == 150
    assert house.store.puts == []


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "what another disk has"])
async def test_a_folder_that_is_not_mounted_gets_nothing(house: House, there: str) -> None:
    """The folder was made anew on the root disk, and every day that was old was archived there and dropped."""
    folder = await one_day_archived(house)
    mounted = folder.rename(house.folder / "the disk")
    if there != "nothing":
        folder.mkdir()
    if there == "what another disk has":
        (folder / "nexhb-archive-0123456789abcdef").write_bytes(marker.CONTENT)
    await nothing_left(house, "lacks the marker nexhb-archive-")
    assert folder.exists() == (there != "nothing")
    settings = Settings(data_dir=house.folder)
    lines = {line.name: line for line in await doctor.examine(house.conn, settings, NOW)}
    assert (lines["archive store"].good, "lacks the marker" in lines["archive store"].said) == (False, True)

    shutil.rmtree(folder, ignore_errors=True)
    mounted.rename(folder)
    assert (await house.nightly()).counts["dropped"] == 1
    lines = {line.name: line for line in await doctor.examine(house.conn, settings, NOW)}
    assert lines["archive store"].good


async def test_a_folder_that_goes_before_the_drop_keeps_the_table(house: House) -> None:
    await one_day_archived(house)

    def unmounted(point: str) -> None:
        if point == "recorded":
            (house.folder / "archive").rename(house.folder / "the disk")

    house.at = unmounted
    run = await house.nightly()
    assert (run.status, (await house.state(OLD))["state"]) == ("failed", "archive_failed")
    assert await partitions.count(house.conn, partitions.name_of(OLD)) == 150


async def test_an_installation_from_before_is_marked_once_one_of_its_archives_is_there(house: House) -> None:
    folder = await one_day_archived(house)
    await house.conn.execute("DELETE FROM archive_markers")
    [path] = folder.glob("nexhb-archive-*")
    path.unlink()
    mounted = folder.rename(house.folder / "the disk")
    await nothing_left(house, "has none of the last 1 archives")
    mounted.rename(folder)
    assert (await house.nightly()).status == "completed"
    assert len(list(folder.glob("nexhb-archive-*"))) == 1


async def test_an_archive_that_was_moved_is_taken_for_the_right_one_by_adopt(house: House) -> None:
    folder = await one_day_archived(house)
    [path] = folder.glob("nexhb-archive-*")
    path.unlink()
    await nothing_left(house, "lacks the marker")
    report = await adopt.adopt(house.conn, house.store.store, house.folder / "spool", NOW, wishes=Wishes())
    assert (report.marked, report.known, report.good) == (True, 1, True)
    assert (await house.nightly()).status == "completed"

    shutil.rmtree(folder)
    await house.fill(OLD - timedelta(days=2))
    spool = house.folder / "spool"
    with pytest.raises(BadInput, match="none of the 2 archives"):
        await adopt.adopt(house.conn, house.store.store, spool, NOW, wishes=Wishes())
    assert not folder.exists()
    assert (await adopt.adopt(house.conn, house.store.store, spool, NOW, wishes=Wishes(force=True))).marked
    assert (await house.nightly()).counts["archived"] == 1


async def test_a_bucket_that_was_emptied_and_headers_that_it_does_not_know(
    house: House, aws: pytest.MonkeyPatch
) -> None:
    """A wrong endpoint or prefix looks the same."""
    aws.setenv("AWS_ACCESS_KEY_ID", "key")
    aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    refuses = {"x-amz-checksum-sha256": (400, "InvalidArgument"), "If-None-Match": (501, "NotImplemented")}
    async with odd_s3(**refuses) as server:
        archive = Archive(url="s3://bucket/nexhb", endpoint_url=server.url, region="us-east-1")
        bucket = Bucket(house.database, house.conn, house.folder, archive)
        await bucket.fill(OLDER)
        assert (await bucket.nightly_s3()).counts["dropped"] == 1
        async with open_store(str(archive.url), archive) as store:
            names = await adopt.names_of(store, 100)
            assert len(names) == 3
            assert await adopt.names_of(store, 2) < names
        await bucket.fill(OLD)
        kept = dict(server.objects)
        server.objects.clear()
        run = await runner.run(bucket.database, nightly.job(bucket.means()), NOW)
        assert (run.status, "lacks the marker" in run.reason) == ("failed", True)
        assert server.objects == {}
        server.objects.update(kept)
        assert (await bucket.nightly_s3()).counts["dropped"] == 1
