"""Archives that are small in the store and large in the memory of a reader. Found in an audit."""

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
    MAX_LINE_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_OBJECTS,
    PACKED,
    Manifest,
    Object,
    decode,
    encode,
    manifest_name,
    object_name,
)  # fmt: skip
from nexhb.archive.opening import open_store
from nexhb.archive.store import Store
from nexhb.config import ArchiveSettings
from nexhb.errors import ArchiveDamaged
from tests.support.nightly import NOW, OLD, House
from tests.support.nightly_s3 import MakeBucket
from tests.swift import S3Server

NAME = partitions.table_name(OLD)
START = partitions.midnight(OLD)
HEADER = ",".join(PACKED).encode() + b"\n"
LARGE = 1 << 28  # bytes, decompressed


def packed(head: bytes, fill: bytes, **how: Any) -> bytes:
    """Return a zstd frame of `head` and then LARGE bytes of `fill`."""
    compress = zstandard.ZstdCompressor(**how).compressobj()
    out, chunk = [compress.compress(head)], fill * (1 << 20)
    out += [compress.compress(chunk) for _ in range(LARGE // len(chunk))]
    return b"".join([*out, compress.flush()])


def manifest_of(content: bytes, **changes: Any) -> Manifest:
    """Return the manifest of an archive with one object."""
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        kind="day", partition=NAME, range_start=START, range_end=START + timedelta(days=1), schema_version=6,
        bucket_seconds=10, columns=PACKED, rows=LARGE // MAX_LINE_BYTES, min_ts=START, max_ts=START,
        stream_bytes=len(HEADER) + LARGE, stream_sha256=64 * "0",
        objects=(Object(name=object_name(NAME, "day", 0, sha256), bytes=len(content), sha256=sha256),),
    )  # fmt: skip
    return msgspec.structs.replace(manifest, **changes)


async def stored(store: Store, folder: Path, manifest: Manifest, content: bytes) -> Archived:
    """Put the archive into a store. Return its entry in the catalog."""
    raw = encode(manifest)
    sha256 = hashlib.sha256(raw).hexdigest()
    name = manifest_name(manifest.partition, manifest.kind, sha256)
    for one, body in ((manifest.objects[0].name, content), (name, raw)):
        path = folder / "body"
        path.write_bytes(body)
        await store.put(one, path, hashlib.sha256(body).digest(), overwrite=True)
    return Archived(NAME, START, START + timedelta(days=1), "dropped", store.url(name), sha256)


@contextmanager
def memory_limit(mebibytes: int) -> Iterator[None]:
    """Assert that memory grows by no more than this within the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


async def pieces_of(store: Store, manifest: Manifest, says: str) -> list[int]:
    """Return the sizes of the pieces that were decompressed before the damage was detected."""
    pieces = []
    try:
        async for piece in verify.stream(store, manifest):
            pieces.append(len(piece))
    except ArchiveDamaged as error:
        assert says in str(error)  # noqa: PT017 - with what came before it
    else:
        raise AssertionError("The damage was not detected.")
    return pieces


async def readers(house: House, store: Store, archived: Archived) -> AsyncIterator[Any]:
    """Yield a call of every function that reads an archive."""
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
    yield late.store_supplement(house.conn, store, [archived], house.folder / "spool", NOW)


async def test_an_object_that_does_not_match_the_manifest_is_not_decompressed(house: House) -> None:
    """Formerly, an object of 1.9 MB that decompressed to 2 GB used 2 GB of the daemon's memory before its hash was
    checked."""
    bomb = packed(HEADER, b"0\n")
    manifest = manifest_of(bomb)
    archived = await stored(house.store, house.folder, manifest, bomb)
    other = bomb[:-1] + bytes([bomb[-1] ^ 1])
    (house.folder / "archive" / manifest.objects[0].name).write_bytes(other)
    assert await pieces_of(house.store, manifest, "is not what was stored") == []
    async for reader in readers(house, house.store, archived):
        with memory_limit(8), pytest.raises(ArchiveDamaged, match="is not what was stored"):
            await reader


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (packed(HEADER, b"0"), "has a row of more than"),
        (packed(HEADER + b'"', b"\n"), "has a row of more than"),  # the line breaks are in quotes and so end no row
        (packed(HEADER, b"0\n", compression_params=zstandard.ZstdCompressionParameters(window_log=25)), "decompressed"),
    ],
    ids=["no line end", "line ends within quotes", "a window of 32 MiB"],
)
async def test_a_matching_object_is_read_in_pieces_and_rows_are_limited(
    house: House, content: bytes, says: str
) -> None:
    archived = await stored(house.store, house.folder, manifest_of(content), content)
    async for reader in readers(house, house.store, archived):
        with memory_limit(8), pytest.raises(ArchiveDamaged, match=says):
            await reader
    assert not await partitions.table_exists(house.conn, NAME)


async def test_no_more_is_read_than_the_manifest_states(house: House) -> None:
    bomb = packed(HEADER, b"0\n")
    manifest = manifest_of(bomb, rows=20, stream_bytes=1 << 20)
    await stored(house.store, house.folder, manifest, bomb)
    pieces = await pieces_of(house.store, manifest, "contains more than the manifest says")
    assert sum(pieces) <= 1 << 20
    assert max(pieces) <= verify.PIECE_BYTES


async def test_another_object_in_s3_is_not_decompressed(house: House, make_bucket: MakeBucket, moto: S3Server) -> None:
    archive: ArchiveSettings = await make_bucket(moto)
    bomb = packed(HEADER, b"0")
    async with open_store(str(archive.url), archive) as store:
        right = await stored(store, house.folder, manifest_of(bomb), bomb)
        with pytest.raises(ArchiveDamaged, match="has a row of more than"):
            await verify.verify(store, store.name_of(right.url), right.sha256)
        wrong = await stored(store, house.folder, manifest_of(bomb), bomb + bomb)
        with pytest.raises(ArchiveDamaged, match="is not what was stored"):
            await restore.drill(house.conn, store, wrong)


def test_a_quote_before_a_million_line_breaks_is_searched_once() -> None:
    """Formerly, at each line break, all earlier quotes were counted again: reading a megabyte took hours."""
    assert verify._end_of_rows(b'"' + b"\n" * (1 << 20)) == 0
    assert verify._end_of_rows(b'a\n"' + b"\n" * (1 << 20)) == 2


MANIFEST = manifest_of(b"some object")
BAD: dict[str, bytes] = {
    "nested": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "large": encode(MANIFEST) + b" " * MAX_MANIFEST_BYTES,
    "cut": encode(MANIFEST)[:-5],
    "no text": b"\xff\xfe",
    **{
        name: encode(msgspec.structs.replace(MANIFEST, **changes))
        for name, changes in dict[str, dict[str, Any]](
            {
                "objects without end": {"objects": MANIFEST.objects * (MAX_OBJECTS + 1)},
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
                    f"object {one}": {"objects": (msgspec.structs.replace(MANIFEST.objects[0], **values),)}
                    for one, values in dict[str, dict[str, Any]](
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
def test_a_manifest_with_values_that_nexhb_never_writes_is_refused(raw: bytes) -> None:
    """Formerly, the name of an object in a manifest could point anywhere, and its size could make a reader wait for
    ever."""
    assert decode(encode(MANIFEST)) == MANIFEST
    with pytest.raises(ArchiveDamaged):
        decode(raw)
