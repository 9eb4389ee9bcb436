"""What every archive store does: a folder, moto, and a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from nexhb.archive.store import CHUNK, Store, open_store
from nexhb.config import Archive
from nexhb.errors import ObjectExists, ObjectMissing, StoreError
from tests.integration.conftest import MakeBucket

NAME = "2026-03-01/heartbeats-0001.copy.zst"


@dataclass(frozen=True)
class Place:
    """A kind of store, and how to open it."""

    kind: str
    settings: Archive


@pytest.fixture(params=["folder", "moto", "swift"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, make_bucket: MakeBucket) -> Place:
    if request.param == "folder":
        return Place("folder", Archive(url=f"file://{tmp_path}/archive"))
    return Place(request.param, await make_bucket(request.getfixturevalue(request.param)))


@pytest.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    async with open_store(str(place.settings.url), place.settings) as store:
        yield store


@dataclass(frozen=True)
class Body:
    """A file and its digest."""

    path: Path
    content: bytes

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.content).digest()


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return body_of(tmp_path, b"a day of heartbeats")


def body_of(folder: Path, content: bytes, name: str = "body") -> Body:
    path = folder / name
    path.write_bytes(content)
    return Body(path, content)


async def read(store: Store, name: str) -> bytes:
    return b"".join([chunk async for chunk in store.get(name)])


async def test_what_was_put_comes_back(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    assert await read(store, NAME) == body.content


async def test_an_object_of_several_chunks_comes_back_whole(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, os.urandom(3 * CHUNK + 5))
    await store.put(NAME, body.path, body.sha256)
    chunks = [chunk async for chunk in store.get(NAME)]
    assert b"".join(chunks) == body.content
    assert max(map(len, chunks)) <= CHUNK


async def test_an_empty_object_comes_back(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, b"")
    await store.put(NAME, body.path, body.sha256)
    assert await read(store, NAME) == b""


async def test_another_opening_of_the_store_finds_it(place: Place, store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    async with open_store(str(place.settings.url), place.settings) as again:
        assert await read(again, NAME) == body.content


async def test_a_name_that_is_taken_is_refused_and_what_is_there_stays(
    store: Store, body: Body, tmp_path: Path
) -> None:
    await store.put(NAME, body.path, body.sha256)
    other = body_of(tmp_path, b"another day", "other")
    with pytest.raises(ObjectExists, match=NAME):
        await store.put(NAME, other.path, other.sha256)
    assert await read(store, NAME) == body.content


async def test_what_is_there_is_replaced_when_told_so(store: Store, body: Body, tmp_path: Path) -> None:
    await store.put(NAME, body.path, body.sha256)
    other = body_of(tmp_path, b"another day", "other")
    await store.put(NAME, other.path, other.sha256, overwrite=True)
    assert await read(store, NAME) == other.content


async def test_what_is_not_there_may_be_replaced_too(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256, overwrite=True)
    assert await read(store, NAME) == body.content


async def test_what_is_missing_is_said_to_be_missing(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    with pytest.raises(ObjectMissing, match="nothing"):
        await read(store, "2026-03-01/nothing")


async def test_a_file_that_is_not_its_digest_is_refused_and_not_there(place: Place, store: Store, body: Body) -> None:
    if place.kind == "moto":
        pytest.skip("moto takes any checksum")
    wrong = hashlib.sha256(b"something else").digest()
    with pytest.raises(StoreError, match=r"BadDigest|has not the SHA-256"):
        await store.put(NAME, body.path, wrong)
    with pytest.raises(ObjectMissing):
        await read(store, NAME)


async def test_a_body_that_is_not_there_is_a_sentence(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nobody"):
        await store.put(NAME, tmp_path / "nobody", b"")


async def test_no_name_leads_out_of_the_store(store: Store, body: Body) -> None:
    for name in ("", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".hidden", "a/./b", "a\0b"):
        with pytest.raises(StoreError, match="no name of an object"):
            await store.put(name, body.path, body.sha256)
        with pytest.raises(StoreError, match="no name of an object"):
            await read(store, name)
        with pytest.raises(StoreError, match="no name of an object"):
            store.url(name)


async def test_names_are_taken_as_they_are(store: Store, tmp_path: Path) -> None:
    names = ("day=1 (late)/a+b%20c&d", "Größe/?#*[x]", "one", "one.2")
    bodies = [body_of(tmp_path, name.encode()) for name in names]
    for name, body in zip(names, bodies, strict=True):
        body.path.write_bytes(body.content)
        await store.put(name, body.path, body.sha256)
    assert [await read(store, name) for name in names] == [body.content for body in bodies]


async def test_the_address_written_down_leads_back_to_the_name(place: Place, store: Store) -> None:
    url = store.url(NAME)
    assert url == f"{place.settings.url}/{NAME}"
    assert store.name_of(url) == NAME


async def test_an_address_elsewhere_is_its_own_name_and_what_is_none_has_none(place: Place, store: Store) -> None:
    base = place.settings.url
    for url in ("s3://elsewhere/nexhb/day/x", "file:///elsewhere/day/x", f"{base}-2/day/x"):
        assert store.name_of(url) == url
    for url in ("x", "a/b/c", "file:///x", "ftp://elsewhere/day/x", f"{base}/../x", f"{base}/.hidden"):
        with pytest.raises(StoreError):
            store.name_of(url)


async def test_a_put_that_is_given_up_leaves_no_object_and_no_task(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, bytes(32 * CHUNK))
    before = asyncio.all_tasks()
    put = asyncio.create_task(store.put(NAME, body.path, body.sha256))
    await asyncio.sleep(0.01)  # any moment will do
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert asyncio.all_tasks() <= before
    with pytest.raises(ObjectMissing):
        await read(store, NAME)
    await store.put(NAME, body.path, body.sha256)


async def test_a_get_that_is_left_early_can_be_had_again(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, os.urandom(4 * CHUNK))
    await store.put(NAME, body.path, body.sha256)
    before = asyncio.all_tasks()
    async with aclosing(store.get(NAME)) as chunks:
        first = await anext(chunks)
    assert body.content.startswith(first)
    assert asyncio.all_tasks() <= before
    assert await read(store, NAME) == body.content


def memory_kb(line: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most since the last reset) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0])


def reset_memory_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


async def test_no_object_lies_in_memory_as_a_whole(place: Place, store: Store, tmp_path: Path) -> None:
    if place.kind == "moto":
        pytest.skip("moto holds it in this very process")
    path, digest, chunk = tmp_path / "large", hashlib.sha256(), os.urandom(CHUNK)
    with path.open("wb") as file:
        for _ in range(64):
            file.write(chunk)
            digest.update(chunk)
    await store.put("first", path, digest.digest())  # what is loaded and allocated once
    before = memory_kb("VmRSS")
    reset_memory_peak()
    await store.put(NAME, path, digest.digest())
    assert sum([len(chunk) async for chunk in store.get(NAME)]) == 64 * CHUNK
    assert memory_kb("VmHWM") - before < 24 * 1024
