"""A folder as an archive store, and the errors of a disk."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from nexhb.archive import file
from nexhb.archive.file import FolderStore
from nexhb.archive.store import CHUNK
from nexhb.errors import ObjectExists, ObjectMissing, StoreError
from tests.conftest import SOON_S
from tests.support.objects import NAME, Body, body_of, read


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return body_of(tmp_path, os.urandom(2 * CHUNK))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "disk" / "archive", timeout_s=30)


def files(store: FolderStore) -> list[str]:
    """Return every file below the store's folder, including hidden ones."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if not path.is_dir())


async def test_only_the_owner_may_read_what_is_archived(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    path = store.folder / NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(path.parents)[:3]] == [0o700] * 3


async def test_existing_folders_keep_their_permissions(store: FolderStore, body: Body) -> None:
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o755)
    await store.put(NAME, body.path, body.sha256)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o755


async def test_a_put_leaves_no_file_but_the_object(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)
    with pytest.raises(StoreError, match=r"the SHA-256 of .* is not"):
        await store.put("other", body.path, b"")
    assert files(store) == [NAME]


async def test_one_of_two_concurrent_puts_of_the_same_name_is_rejected(store: FolderStore, tmp_path: Path) -> None:
    bodies = [body_of(tmp_path, os.urandom(8 * CHUNK), str(number)) for number in range(2)]
    puts = (store.put(NAME, body.path, body.sha256) for body in bodies)
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert [type(result) for result in results if result] == [ObjectExists]
    assert await read(store, NAME) == bodies[results.index(None)].content
    assert files(store) == [NAME]


async def test_files_left_by_a_killed_process_are_ignored_and_deleted(store: FolderStore, body: Body) -> None:
    await store.put("before", body.path, body.sha256)
    old, new, foreign = (store.folder / f".{name}.partial" for name in ("x.1", "x.2", "y.1"))
    for leftover in (old, new, foreign):
        leftover.write_bytes(b"half")
    for leftover in (old, foreign):
        os.utime(leftover, (1, 1))
    await store.put("x", body.path, body.sha256)
    # The recent partial file may belong to another daemon that still writes it.
    assert files(store) == sorted(["before", "x", new.name, foreign.name])


async def test_a_file_that_grows_or_shrinks_during_the_put_is_refused(store: FolderStore, body: Body) -> None:
    body.path.write_bytes(body.content + b"x")
    with pytest.raises(StoreError, match=r"the SHA-256 of .* is not"):
        await store.put(NAME, body.path, body.sha256)
    assert files(store) == []


async def test_every_folder_with_a_new_entry_is_synced(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    await store.put(NAME, body.path, body.sha256)
    first, *folders = synced
    assert first.endswith(".partial")
    assert folders == [str(folder) for folder in list((store.folder / NAME).parents)[:4]]
    # For another put, the folders exist already. The put that created them may have been killed before syncing them.
    synced.clear()
    await store.put(f"{NAME}.2", body.path, body.sha256)
    assert synced[1:] == folders[:2]


def read_from_disk() -> int:
    """Return how many bytes this process has read from disks so far."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


async def test_reading_back_reads_the_disk_and_not_the_page_cache(body: Body) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # on a disk; the tests' folders may be in memory
        store = FolderStore(Path(folder, "archive"), timeout_s=30)
        await store.put(NAME, body.path, body.sha256)
        fd = os.open(store.folder / NAME, os.O_RDONLY)
        before = read_from_disk()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, CHUNK, 0)
        os.close(fd)
        if read_from_disk() == before:
            pytest.skip("the pages of files cannot be evicted from the page cache")
        await read(store, NAME)
        before = read_from_disk()
        assert await read(store, NAME) == body.content
        assert read_from_disk() - before >= len(body.content)


async def test_a_file_in_place_of_a_folder_is_an_error_that_explains_it(store: FolderStore, body: Body) -> None:
    store.folder.parent.mkdir()
    store.folder.write_bytes(b"")
    with pytest.raises(StoreError, match=f"put {store.folder}/{NAME}: {store.folder}: a folder on the path is a file"):
        await store.put(NAME, body.path, body.sha256)
    with pytest.raises(StoreError, match="a folder on the path is a file"):
        await read(store, NAME)


async def test_a_folder_in_place_of_a_file_is_an_error_that_explains_it(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    folder = NAME.partition("/")[0]
    with pytest.raises(StoreError, match="it is a folder, not a file"):
        await read(store, folder)
    with pytest.raises(ObjectExists):
        await store.put(folder, body.path, body.sha256)
    with pytest.raises(StoreError, match="it is a folder, not a file"):
        await store.put(folder, body.path, body.sha256, overwrite=True)


async def test_a_file_above_the_size_limit_is_explained_and_leaves_nothing(store: FolderStore, body: Body) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, hard))
    try:
        with pytest.raises(StoreError, match="too large for the file system"):
            await store.put(NAME, body.path, body.sha256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(store) == []
    await store.put(NAME, body.path, body.sha256)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_explained_and_leaves_nothing(tiny_disk: Path, body: Body) -> None:
    store = FolderStore(tiny_disk, timeout_s=30)
    with pytest.raises(StoreError, match=f"put {tiny_disk}/{NAME}: no space is left"):
        await store.put(NAME, body.path, body.sha256)
    assert files(store) == []


async def test_a_read_only_disk_is_explained(tiny_disk: Path, body: Body) -> None:
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StoreError, match="the file system is read-only"):
        await FolderStore(tiny_disk, timeout_s=30).put(NAME, body.path, body.sha256)


async def test_a_missing_permission_is_explained(store: FolderStore, body: Body) -> None:
    if os.geteuid() == 0:
        pytest.skip("root bypasses file permissions")
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o500)
    with pytest.raises(StoreError, match="permission denied"):
        await store.put(NAME, body.path, body.sha256)


async def test_a_put_that_timed_out_stores_nothing_afterwards(store: FolderStore, body: Body) -> None:
    store = FolderStore(store.folder, timeout_s=0.2)
    slow = body.path.with_name("slow")
    os.mkfifo(slow)
    with pytest.raises(StoreError, match=r"took longer than 0\.2 s"):
        await store.put(NAME, slow, body.sha256)
    # The put's thread still runs, and now gets the bytes that it waited for.
    with suppress(BrokenPipeError):  # the thread discards the bytes
        await asyncio.to_thread(slow.write_bytes, body.content)
    while any(name.endswith(".partial") for name in files(store)):
        await asyncio.sleep(0.01)
    assert files(store) == []
    with pytest.raises(ObjectMissing):
        await read(store, NAME)


async def test_a_get_that_times_out_is_explained(store: FolderStore) -> None:
    store = FolderStore(store.folder, timeout_s=0.2)
    slow = store.folder / "slow"
    slow.parent.mkdir(parents=True)
    os.mkfifo(slow)
    with pytest.raises(StoreError, match=r"get .*/slow took longer than 0\.2 s"):
        await read(store, "slow")
    await asyncio.to_thread(slow.write_bytes, b"")  # lets the thread of the get end


async def test_a_get_that_is_cancelled_while_it_opens_its_file_closes_it(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The get's thread opens the file despite the cancellation. Formerly, the file stayed open until the next garbage
    collection."""
    await store.put(NAME, body.path, body.sha256)
    opened: list[BinaryIO] = []
    really = file._open

    def slowly(path: Path) -> BinaryIO:
        time.sleep(0.3)
        opened.append(really(path))
        return opened[0]

    monkeypatch.setattr(file, "_open", slowly)
    reading = asyncio.create_task(read(store, NAME))
    await asyncio.sleep(0.1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(SOON_S):
        while not (opened and opened[0].closed):
            await asyncio.sleep(0.01)


async def test_the_time_limit_of_a_get_includes_all_of_it(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    chunks = FolderStore(store.folder, timeout_s=0.2).get(NAME)
    await anext(chunks)
    await asyncio.sleep(0.3)
    with pytest.raises(StoreError, match="took longer"):
        await anext(chunks)


async def test_a_large_object_reaches_the_disk_piece_by_piece(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fsync of 256 MiB delays the commits of a PostgreSQL on the same disk four times as long."""
    monkeypatch.setattr(file, "CHUNK", CHUNK // 8)
    monkeypatch.setattr(file, "SYNC_CHUNKS", 4)
    sizes: list[int] = []
    plain = file._sync

    def noted(copy: BinaryIO) -> None:
        plain(copy)
        sizes.append(copy.tell())

    monkeypatch.setattr(file, "_sync", noted)
    await store.put(NAME, body.path, body.sha256)
    assert sizes == [CHUNK // 2, CHUNK, CHUNK * 3 // 2, 2 * CHUNK, 2 * CHUNK]


async def test_an_existing_object_is_not_copied_first(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated nightly run puts objects that the previous run has stored already. Writing them again would cost
    hundreds of MB per day."""
    await store.put(NAME, body.path, body.sha256)
    monkeypatch.setattr(file, "_create", None)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)


async def test_names_lists_objects_and_at_most_the_given_number(store: FolderStore, body: Body) -> None:
    """Hidden files, files in deeper folders and symbolic links are not nexhb's: the folder may contain another
    archive."""
    for name in ("one", "day/two", "day/three"):
        await store.put(name, body.path, body.sha256)
    (store.folder / "day" / "deeper").mkdir()
    (store.folder / "day" / "deeper" / "four").touch()
    for hidden in (".hidden", "day/.two.0123.partial"):
        (store.folder / hidden).touch()
    (store.folder / ".snapshots").mkdir()
    (store.folder / ".snapshots" / "five").touch()
    (store.folder / "loop").symlink_to(store.folder, target_is_directory=True)
    assert {name async for name in store.names(100)} == {"one", "day/two", "day/three", "loop"}
    for most in (1, 2):
        assert len([name async for name in store.names(most)]) == most
    assert [name async for name in FolderStore(store.folder / "nowhere", timeout_s=30).names(2)] == []
