"""The behaviour of every archive store: a folder, moto, and a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from nexhb.archive.opening import open_store
from nexhb.archive.store import CHUNK, Store
from nexhb.config import ArchiveSettings
from nexhb.errors import ObjectExists, ObjectMissing, StoreError
from tests.support.nightly_s3 import MakeBucket
from tests.support.objects import NAME, Body, body_of, read


@dataclass(frozen=True)
class Place:
    """A kind of store, and how to open it."""

    kind: str
    settings: ArchiveSettings


@pytest.fixture(params=["folder", "moto", "swift"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, make_bucket: MakeBucket) -> Place:
    if request.param == "folder":
        return Place("folder", ArchiveSettings(url=f"file://{tmp_path}/archive"))
    return Place(request.param, await make_bucket(request.getfixturevalue(request.param)))


@pytest.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    async with open_store(str(place.settings.url), place.settings) as store:
        yield store


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return body_of(tmp_path, b"a day of heartbeats")


async def test_get_returns_what_was_put(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    assert await read(store, NAME) == body.content


async def test_an_object_of_several_chunks_is_returned_completely(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, os.urandom(3 * CHUNK + 5))
    await store.put(NAME, body.path, body.sha256)
    chunks = [chunk async for chunk in store.get(NAME)]
    assert b"".join(chunks) == body.content
    assert max(map(len, chunks)) <= CHUNK


async def test_an_empty_object_is_returned(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, b"")
    await store.put(NAME, body.path, body.sha256)
    assert await read(store, NAME) == b""


async def test_an_object_can_be_read_after_the_store_is_reopened(place: Place, store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    async with open_store(str(place.settings.url), place.settings) as again:
        assert await read(again, NAME) == body.content


async def test_an_existing_name_is_refused_and_its_object_is_kept(store: Store, body: Body, tmp_path: Path) -> None:
    await store.put(NAME, body.path, body.sha256)
    other = body_of(tmp_path, b"another day", "other")
    with pytest.raises(ObjectExists, match=NAME):
        await store.put(NAME, other.path, other.sha256)
    assert await read(store, NAME) == body.content


async def test_overwrite_replaces_an_object(store: Store, body: Body, tmp_path: Path) -> None:
    await store.put(NAME, body.path, body.sha256)
    other = body_of(tmp_path, b"another day", "other")
    await store.put(NAME, other.path, other.sha256, overwrite=True)
    assert await read(store, NAME) == other.content


async def test_overwrite_also_stores_a_new_object(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256, overwrite=True)
    assert await read(store, NAME) == body.content


async def test_a_missing_object_is_reported_as_missing(store: Store, body: Body) -> None:
    await store.put(NAME, body.path, body.sha256)
    with pytest.raises(ObjectMissing, match="nothing"):
        await read(store, "2026-03-01/nothing")


async def test_a_file_that_does_not_match_its_digest_is_not_stored(place: Place, store: Store, body: Body) -> None:
    if place.kind == "moto":
        pytest.skip("moto does not verify checksums")
    wrong = hashlib.sha256(b"something else").digest()
    with pytest.raises(StoreError, match=r"BadDigest|the SHA-256 of .* is not"):
        await store.put(NAME, body.path, wrong)
    with pytest.raises(ObjectMissing):
        await read(store, NAME)


async def test_a_missing_body_is_explained(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nobody"):
        await store.put(NAME, tmp_path / "nobody", b"")


async def test_no_name_leads_out_of_the_store(store: Store, body: Body) -> None:
    for name in ("", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".hidden", "a/./b", "a\0b"):
        with pytest.raises(StoreError, match="not a valid object name"):
            await store.put(name, body.path, body.sha256)
        with pytest.raises(StoreError, match="not a valid object name"):
            await read(store, name)
        with pytest.raises(StoreError, match="not a valid object name"):
            store.url(name)


async def test_names_are_used_as_they_are(store: Store, tmp_path: Path) -> None:
    names = ("day=1 (late)/a+b%20c&d", "Größe/?#*[x]", "one", "one.2")
    bodies = [body_of(tmp_path, name.encode()) for name in names]
    for name, body in zip(names, bodies, strict=True):
        body.path.write_bytes(body.content)
        await store.put(name, body.path, body.sha256)
    assert [await read(store, name) for name in names] == [body.content for body in bodies]


async def test_the_url_of_an_object_leads_back_to_its_name(place: Place, store: Store) -> None:
    url = store.url(NAME)
    assert url == f"{place.settings.url}/{NAME}"
    assert store.name_of(url) == NAME


async def test_the_name_of_a_url_elsewhere_is_the_url_and_other_texts_are_refused(place: Place, store: Store) -> None:
    base = place.settings.url
    for url in ("s3://elsewhere/nexhb/day/x", "file:///elsewhere/day/x", f"{base}-2/day/x"):
        assert store.name_of(url) == url
    for url in ("x", "a/b/c", "file:///x", "ftp://elsewhere/day/x", f"{base}/../x", f"{base}/.hidden"):
        with pytest.raises(StoreError):
            store.name_of(url)


async def test_a_cancelled_put_leaves_no_object_and_no_task(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, bytes(32 * CHUNK))
    before = asyncio.all_tasks()
    put = asyncio.create_task(store.put(NAME, body.path, body.sha256))
    await asyncio.sleep(0.01)  # whatever the put does at this moment
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert asyncio.all_tasks() <= before
    with pytest.raises(ObjectMissing):
        await read(store, NAME)
    await store.put(NAME, body.path, body.sha256)


async def test_a_get_that_ended_early_can_be_repeated(store: Store, tmp_path: Path) -> None:
    body = body_of(tmp_path, os.urandom(4 * CHUNK))
    await store.put(NAME, body.path, body.sha256)
    before = asyncio.all_tasks()
    async with aclosing(store.get(NAME)) as chunks:
        first = await anext(chunks)
    assert body.content.startswith(first)
    assert asyncio.all_tasks() <= before
    assert await read(store, NAME) == body.content


def memory_kb(line: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (the peak since the last reset) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0])


def reset_memory_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


async def test_no_object_is_held_in_memory_completely(place: Place, store: Store, tmp_path: Path) -> None:
    if place.kind == "moto":
        pytest.skip("moto stores objects in the memory of the tests' process")
    path, digest, chunk = tmp_path / "large", hashlib.sha256(), os.urandom(CHUNK)
    with path.open("wb") as file:
        for _ in range(64):
            file.write(chunk)
            digest.update(chunk)
    await store.put("first", path, digest.digest())  # the first put allocates memory that later puts use again
    before = memory_kb("VmRSS")
    reset_memory_peak()
    await store.put(NAME, path, digest.digest())
    assert sum([len(chunk) async for chunk in store.get(NAME)]) == 64 * CHUNK
    assert memory_kb("VmHWM") - before < 24 * 1024
