"""A folder as an archive store: what a disk does."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import subprocess
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
from tests.integration.test_archive_stores import NAME, Body, body_of, read


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return body_of(tmp_path, os.urandom(2 * CHUNK))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "disk" / "archive", timeout_s=30)


def files(store: FolderStore) -> list[str]:
    """Every file below the store's folder, hidden ones too."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if not path.is_dir())


async def test_only_the_owner_may_read_what_is_archived(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    path = store.folder / NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(path.parents)[:3]] == [0o700] * 3


async def test_folders_that_were_there_keep_their_permissions(store: FolderStore, body: Body) -> None:
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o755)
    await store.put(NAME, body.path, body.sha256)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o755


async def test_nothing_but_the_object_is_left(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)
    with pytest.raises(StoreError, match="has not the SHA-256"):
        await store.put("other", body.path, b"")
    assert files(store) == [NAME]


async def test_of_two_puts_of_one_name_at_once_one_is_refused(store: FolderStore, tmp_path: Path) -> None:
    bodies = [body_of(tmp_path, os.urandom(8 * CHUNK), str(number)) for number in range(2)]
    puts = (store.put(NAME, body.path, body.sha256) for body in bodies)
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert [type(result) for result in results if result] == [ObjectExists]
    assert await read(store, NAME) == bodies[results.index(None)].content
    assert files(store) == [NAME]


async def test_what_a_killed_process_left_is_in_nobodys_way_and_goes(store: FolderStore, body: Body) -> None:
    await store.put("before", body.path, body.sha256)
    old, new, foreign = (store.folder / f".{name}.partial" for name in ("x.1", "x.2", "y.1"))
    for leftover in (old, new, foreign):
        leftover.write_bytes(b"half")
    for leftover in (old, foreign):
        os.utime(leftover, (1, 1))
    await store.put("x", body.path, body.sha256)
    # The new one may be another daemon's that still writes.
    assert files(store) == sorted(["before", "x", new.name, foreign.name])


async def test_a_file_that_grows_or_shrinks_under_the_put_is_refused(store: FolderStore, body: Body) -> None:
    body.path.write_bytes(body.content + b"x")
    with pytest.raises(StoreError, match="has not the SHA-256"):
        await store.put(NAME, body.path, body.sha256)
    assert files(store) == []


async def test_every_folder_whose_entries_are_new_is_synced(
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
    # Another put finds the folders made, perhaps by one that was killed before it had synced them.
    synced.clear()
    await store.put(f"{NAME}.2", body.path, body.sha256)
    assert synced[1:] == folders[:2]


def read_from_disk() -> int:
    """Bytes that this process had read from disks so far."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


async def test_what_is_read_back_is_what_the_disk_has_and_not_what_memory_remembers(
    store: FolderStore, body: Body
) -> None:
    await store.put(NAME, body.path, body.sha256)
    fd = os.open(store.folder / NAME, os.O_RDONLY)
    before = read_from_disk()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, CHUNK, 0)
    os.close(fd)
    if read_from_disk() == before:
        pytest.skip("this file system has no disk, or forgets nothing")
    await read(store, NAME)
    before = read_from_disk()
    assert await read(store, NAME) == body.content
    assert read_from_disk() - before >= len(body.content)


async def test_a_file_where_a_folder_should_be_is_a_sentence(store: FolderStore, body: Body) -> None:
    store.folder.parent.mkdir()
    store.folder.write_bytes(b"")
    with pytest.raises(
        StoreError, match=f"put {store.folder}/{NAME}: {store.folder}: there is a file where a folder should be"
    ):
        await store.put(NAME, body.path, body.sha256)
    with pytest.raises(StoreError, match="there is a file where a folder should be"):
        await read(store, NAME)


async def test_a_folder_where_a_file_should_be_is_a_sentence(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    folder = NAME.partition("/")[0]
    with pytest.raises(StoreError, match="there is a folder where a file should be"):
        await read(store, folder)
    with pytest.raises(ObjectExists):
        await store.put(folder, body.path, body.sha256)
    with pytest.raises(StoreError, match="there is a folder where a file should be"):
        await store.put(folder, body.path, body.sha256, overwrite=True)


async def test_a_file_beyond_the_limit_is_a_sentence_and_leaves_nothing(store: FolderStore, body: Body) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, hard))
    try:
        with pytest.raises(StoreError, match="takes no file of this size"):
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
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_a_sentence_and_leaves_nothing(tiny_disk: Path, body: Body) -> None:
    store = FolderStore(tiny_disk, timeout_s=30)
    with pytest.raises(StoreError, match=f"put {tiny_disk}/{NAME}: no space is left"):
        await store.put(NAME, body.path, body.sha256)
    assert files(store) == []


async def test_a_read_only_disk_is_a_sentence(tiny_disk: Path, body: Body) -> None:
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StoreError, match="the file system is read-only"):
        await FolderStore(tiny_disk, timeout_s=30).put(NAME, body.path, body.sha256)


async def test_missing_permission_is_a_sentence(store: FolderStore, body: Body) -> None:
    if os.geteuid() == 0:
        pytest.skip("no permission binds root")
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o500)
    with pytest.raises(StoreError, match="permission is missing"):
        await store.put(NAME, body.path, body.sha256)


async def test_a_put_that_took_too_long_never_comes_true_afterwards(store: FolderStore, body: Body) -> None:
    store = FolderStore(store.folder, timeout_s=0.2)
    slow = body.path.with_name("slow")
    os.mkfifo(slow)
    with pytest.raises(StoreError, match=r"took longer than 0\.2 s"):
        await store.put(NAME, slow, body.sha256)
    # Its thread is still there, and now gets all that it waited for.
    with suppress(BrokenPipeError):  # it does not want it any more
        await asyncio.to_thread(slow.write_bytes, body.content)
    while any(name.endswith(".partial") for name in files(store)):
        await asyncio.sleep(0.01)
    assert files(store) == []
    with pytest.raises(ObjectMissing):
        await read(store, NAME)


async def test_a_get_that_takes_too_long_is_a_sentence(store: FolderStore) -> None:
    store = FolderStore(store.folder, timeout_s=0.2)
    slow = store.folder / "slow"
    slow.parent.mkdir(parents=True)
    os.mkfifo(slow)
    with pytest.raises(StoreError, match=r"get .*/slow took longer than 0\.2 s"):
        await read(store, "slow")
    await asyncio.to_thread(slow.write_bytes, b"")  # lets the thread go


async def test_a_get_given_up_while_its_file_is_opened_closes_it(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread opens it all the same: it stayed open until the collector came by."""
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


async def test_the_time_of_a_get_counts_from_its_beginning(store: FolderStore, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    chunks = FolderStore(store.folder, timeout_s=0.2).get(NAME)
    await anext(chunks)
    await asyncio.sleep(0.3)
    with pytest.raises(StoreError, match="took longer"):
        await anext(chunks)


async def test_a_large_object_reaches_the_disk_piece_by_piece(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fsync of 256 MiB holds up the commits of a PostgreSQL on the same disk four times as long."""
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


async def test_an_object_that_is_there_is_not_copied_beside_first(
    store: FolderStore, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that begins again puts what the one before has stored: a day of hundreds of MB."""
    await store.put(NAME, body.path, body.sha256)
    monkeypatch.setattr(file, "_create", None)
    with pytest.raises(ObjectExists):
        await store.put(NAME, body.path, body.sha256)


async def test_names_are_those_of_objects_and_no_more_than_asked_for(store: FolderStore, body: Body) -> None:
    """What is hidden, lies deeper, or behind a link, is none of ours: a folder above another archive, a disk's own."""
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
