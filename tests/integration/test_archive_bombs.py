"""Found by an audit: archives that are small in the store and large in whoever reads them."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from nexhb import partitions
from nexhb.archive import get, late, restore, verify
from nexhb.archive.catalog import Archived
from nexhb.archive.manifest import (
    MOST_BYTES,
    MOST_LINE_BYTES,
    MOST_OBJECTS,
    PACKED,
    Manifest,
    Object,
    decode,
    encode,
    manifest_name,
    object_name,
)  # fmt: skip
from nexhb.archive.store import Store, open_store
from nexhb.config import Archive
from nexhb.db import Connection, Database
from nexhb.errors import ArchiveDamaged
from tests.integration.conftest import MakeBucket
from tests.integration.test_nightly import NOW, OLD, House
from tests.swift import S3Server

NAME = partitions.name_of(OLD)
START = partitions.midnight(OLD)
HEADER = ",".join(PACKED).encode() + b"\n"
LARGE = 1 << 28  # bytes, unpacked


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


def packed(head: bytes, fill: bytes, **how: Any) -> bytes:
    """A zstd frame of `head` and then LARGE bytes of `fill`."""
    compress = zstandard.ZstdCompressor(**how).compressobj()
    out, chunk = [compress.compress(head)], fill * (1 << 20)
    out += [compress.compress(chunk) for _ in range(LARGE // len(chunk))]
    return b"".join([*out, compress.flush()])


def manifest_of(content: bytes, **changes: Any) -> Manifest:
    """What a manifest says of one object."""
    sha256 = hashlib.sha256(content).hexdigest()
    found = Manifest(
        kind="day", partition=NAME, range_start=START, range_end=START + timedelta(days=1), schema_version=6,
        bucket_seconds=10, columns=PACKED, rows=LARGE // MOST_LINE_BYTES, min_ts=START, max_ts=START,
        stream_bytes=len(HEADER) + LARGE, stream_sha256=64 * "0",
        objects=(Object(name=object_name(NAME, "day", 0, sha256), bytes=len(content), sha256=sha256),),
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


async def stored(store: Store, folder: Path, manifest: Manifest, content: bytes) -> Archived:
    """The archive in a store, and as a database would know it."""
    raw = encode(manifest)
    sha256 = hashlib.sha256(raw).hexdigest()
    name = manifest_name(manifest.partition, manifest.kind, sha256)
    for one, body in ((manifest.objects[0].name, content), (name, raw)):
        path = folder / "body"
        path.write_bytes(body)
        await store.put(one, path, hashlib.sha256(body).digest(), overwrite=True)
    return Archived(NAME, START, START + timedelta(days=1), "dropped", store.url(name), sha256)


@contextmanager
def most_held(mebibytes: int) -> Iterator[None]:
    """The block holds no more at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


async def pieces_of(store: Store, manifest: Manifest, says: str) -> list[int]:
    """The sizes of the pieces that were unpacked before the archive was found damaged."""
    pieces = []
    try:
        async for piece in verify.stream(store, manifest):
            pieces.append(len(piece))
    except ArchiveDamaged as error:
        assert says in str(error)  # noqa: PT017 - with what came before it
    else:
        raise AssertionError("It was not found damaged.")
    return pieces


async def readers(house: House, store: Store, archived: Archived) -> AsyncIterator[Any]:
    """Everybody who reads an archive, one after the other."""
    yield verify.verify(store, store.name_of(archived.url), archived.sha256)
    yield restore.drill(house.conn, store, archived)
    yield restore.restore_day(house.conn, store, [archived], NOW)
    yield restore.restore_into(house.conn, store, [archived], "somewhere")
    yield get.heartbeats_of(store, [archived], "kiosk-1")
    await house.conn.execute(
        """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
           VALUES ($1, $1, 1, 1, 1, false, 'dropped')""",
        START,
    )
    yield late.supplement(house.conn, store, [archived], house.folder / "spool", NOW)


async def test_an_object_that_is_not_the_manifests_is_not_unpacked_at_all(house: House) -> None:
    """An object of 1.9 MB that unpacked to 2 GB took 2 GB of the daemon, before its hash was looked at."""
    bomb = packed(HEADER, b"0\n")
    manifest = manifest_of(bomb)
    archived = await stored(house.store, house.folder, manifest, bomb)
    other = bomb[:-1] + bytes([bomb[-1] ^ 1])
    (house.folder / "archive" / manifest.objects[0].name).write_bytes(other)
    assert await pieces_of(house.store, manifest, "is not what was stored") == []
    async for reader in readers(house, house.store, archived):
        with most_held(8), pytest.raises(ArchiveDamaged, match="is not what was stored"):
            await reader


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (packed(HEADER, b"0"), "has a row of more than"),
        (packed(HEADER + b'"', b"\n"), "has a row of more than"),  # quoted: not one of these line ends is one
        (packed(HEADER, b"0\n", compression_params=zstandard.ZstdCompressionParameters(window_log=25)), "unpacked"),
    ],
    ids=["no line end", "line ends within quotes", "a window of 32 MiB"],
)
async def test_an_object_that_is_the_manifests_is_read_in_pieces_and_rows_have_an_end(
    house: House, content: bytes, says: str
) -> None:
    archived = await stored(house.store, house.folder, manifest_of(content), content)
    async for reader in readers(house, house.store, archived):
        with most_held(8), pytest.raises(ArchiveDamaged, match=says):
            await reader
    assert not await partitions.present(house.conn, NAME)


async def test_no_more_is_read_than_the_manifest_says(house: House) -> None:
    bomb = packed(HEADER, b"0\n")
    manifest = manifest_of(bomb, rows=20, stream_bytes=1 << 20)
    await stored(house.store, house.folder, manifest, bomb)
    pieces = await pieces_of(house.store, manifest, "more in it than the manifest says")
    assert sum(pieces) <= 1 << 20
    assert max(pieces) <= verify.PIECE


async def test_an_object_in_s3_that_is_another_is_not_unpacked(
    house: House, make_bucket: MakeBucket, moto: S3Server
) -> None:
    archive: Archive = await make_bucket(moto)
    bomb = packed(HEADER, b"0")
    async with open_store(str(archive.url), archive) as store:
        right = await stored(store, house.folder, manifest_of(bomb), bomb)
        with pytest.raises(ArchiveDamaged, match="has a row of more than"):
            await verify.verify(store, store.name_of(right.url), right.sha256)
        wrong = await stored(store, house.folder, manifest_of(bomb), bomb + bomb)
        with pytest.raises(ArchiveDamaged, match="is not what was stored"):
            await restore.drill(house.conn, store, wrong)


def test_a_quote_before_a_million_line_ends_is_looked_through_once() -> None:
    """Each line end was a reason to count all quotes before it again: a megabyte took hours."""
    assert verify._end_of_rows(b'"' + b"\n" * (1 << 20)) == 0
    assert verify._end_of_rows(b'a\n"' + b"\n" * (1 << 20)) == 2


MANIFEST = manifest_of(b"some object")
BAD: dict[str, bytes] = {
    "nested": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "large": encode(MANIFEST) + b" " * MOST_BYTES,
    "cut": encode(MANIFEST)[:-5],
    "no text": b"\xff\xfe",
    **{
        name: encode(msgspec.structs.replace(MANIFEST, **changes))
        for name, changes in dict[str, dict[str, Any]](
            {
                "objects without end": {"objects": MANIFEST.objects * (MOST_OBJECTS + 1)},
                "no object": {"objects": ()},
                "columns": {"columns": PACKED * 10},
                "rows below zero": {"rows": -1},
                "bytes beyond the rows": {"rows": 1, "stream_bytes": 2 << 30},
                "a kind of its own": {"kind": "x"},
                "no name": {"partition": ""},
                "a long name": {"partition": "x" * 64},
                "a range that ends before": {"range_end": START},
                "a local time": {"max_ts": START.replace(tzinfo=None)},
                "long buckets": {"bucket_seconds": 1 << 40},
                "no hash": {"stream_sha256": "x"},
                "another format": {"format": "nexhb-archive-9"},
                "another compression": {"compression": "gzip"},
                **{
                    f"object {one}": {"objects": (msgspec.structs.replace(MANIFEST.objects[0], **said),)}
                    for one, said in dict[str, dict[str, Any]](
                        {
                            "elsewhere": {"name": f"../../{MANIFEST.objects[0].name}"},
                            "of another day": {"name": MANIFEST.objects[0].name.replace("2026", "2025")},
                            "of a terabyte": {"bytes": 1 << 40},
                            "of nothing": {"bytes": 0},
                            "without a hash": {"sha256": "../" * 20},
                        }
                    ).items()
                },
            }
        ).items()
    },
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_a_manifest_that_nexhb_does_not_write_is_not_followed(raw: bytes) -> None:
    """A name could lead anywhere, and a size make whoever reads it wait for ever."""
    assert decode(encode(MANIFEST)) == MANIFEST
    with pytest.raises(ArchiveDamaged):
        decode(raw)
