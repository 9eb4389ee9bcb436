"""A table of heartbeats → the objects of an archive and its manifest, in constant memory.

COPY hands over what the socket holds, some 25 kB at a time; each piece is hashed, compressed and written to a spool
file in a thread, so that heartbeats go on meanwhile. Larger pieces, or fetching one while the last is compressed, made
no difference that could be told from noise: PostgreSQL is what is waited for. A spool file is one object: it is stored
under a name made of its own hash, and gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from nexhb import log, migrate, sql
from nexhb.archive.manifest import PACKED, Manifest, Object, encode, manifest_name, object_name
from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.errors import ObjectExists
from nexhb.partitions import quoted

_Q = sql.queries("archive")
_log = log.get("archive")

OBJECT_BYTES = 240 << 20  # compressed; with what the compressor still holds an object stays below 256 MiB

# Bytes a row, and seconds of one core, for a day of 2,000 varied devices at 60 s ± 15 s: 2.88 million rows, 481 MB of
# CSV (level 19: a fifth of it, times five):
#
#   window                level 3        level 6        level 9        level 12        level 19
#   default               19.63, 0.9 s   17.82, 2.6 s   17.29, 5.2 s   17.10, 11.1 s   15.35, 252 s
#   128 KiB               18.72, 0.6 s   17.14, 2.2 s   16.60, 3.6 s   16.58,  7.0 s   15.28, 129 s
#   128 KiB, matches ≥ 6  18.16, 0.6 s   16.72, 2.2 s   16.42, 3.4 s   16.42,  6.5 s   15.37, 118 s
#
# A device's rows are like each other and like no other's, so whatever is found further back than half a day of one
# device costs time and a longer distance (32 MiB, matches ≥ 6: 17.11, 6.8 s). Matches of less than six bytes are found
# in digits that are chance, and cost more than the digits. docs/archive.md has what each column costs.
LEVEL = 9
WINDOW_LOG = 17
MIN_MATCH = 6

BUCKET_SECONDS = 10  # ingest.bucket_seconds, where it is not changed


@dataclass(frozen=True)
class Source:
    """What is archived."""

    table: str
    kind: str  # day | late
    partition: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Stored:
    """An archive in its store, not yet read back."""

    manifest: Manifest
    name: str  # of the manifest
    sha256: str  # of the manifest, hex


def select(rows: str, bucket_seconds: int) -> str:
    """The statement whose CSV is an archive's stream; `rows`: a plain table, or a query in brackets."""
    return _Q["packed"].replace("$rows", rows).replace("$bucket_seconds", str(bucket_seconds))


def select_table(table: str, bucket_seconds: int = BUCKET_SECONDS) -> str:
    """The same for a table of heartbeats."""
    return select(f"({_Q['spelled_out'].replace('$table', quoted(table))})", bucket_seconds)


async def export(
    conn: Connection,
    source: Source,
    store: Store,
    spool: Path,
    *,
    bucket_seconds: int = BUCKET_SECONDS,
    object_bytes: int = OBJECT_BYTES,
    at: Callable[[str], None] = lambda _: None,
) -> Stored:
    """Store every row of `source.table`. Raises StoreError, or what the database says.

    `bucket_seconds`: what most rows' buckets are; another one is stored as well, and longer. `spool`: a folder for one
    object at a time. `at` hears of each thing that is durable.
    """
    await conn.execute(_Q["session"])
    stream = _Stream(source, store, spool, object_bytes, at)
    try:
        statement = select_table(source.table, bucket_seconds)
        status = await conn.copy_from_query(statement, output=stream.take, format="csv", header=True, encoding="utf-8")
        await stream.finish()
    finally:
        stream.close()
    rows = int(status.rpartition(" ")[2])
    span = await conn.fetchrow(_Q["span"].replace("$table", quoted(source.table)))
    assert span is not None  # noqa: S101 - an aggregate has one row
    manifest = Manifest(
        kind=source.kind,
        partition=source.partition,
        range_start=source.start,
        range_end=source.end,
        schema_version=migrate.find()[-1].version,
        bucket_seconds=bucket_seconds,
        columns=PACKED,
        rows=rows,
        min_ts=span["min_ts"],
        max_ts=span["max_ts"],
        stream_bytes=stream.bytes,
        stream_sha256=stream.sha256.hexdigest(),
        objects=tuple(stream.objects),
    )
    return await _store_manifest(manifest, store, spool, at)


async def _store_manifest(manifest: Manifest, store: Store, spool: Path, at: Callable[[str], None]) -> Stored:
    raw = encode(manifest)
    digest = hashlib.sha256(raw)
    name = manifest_name(manifest.partition, manifest.kind, digest.hexdigest())
    async with spooled(spool) as file:
        file.write(raw)
        file.flush()
        await put(store, name, Path(file.name), digest.digest())
    at("manifest stored")
    return Stored(manifest, name, digest.hexdigest())


async def put(store: Store, name: str, body: Path, sha256: bytes) -> None:
    """Store `body` unless it is there already: a name is made of its content's hash. One that lies there and is
    something else has rotted, and is replaced."""
    try:
        await store.put(name, body, sha256)
    except ObjectExists:
        if not await _holds(store, name, await asyncio.to_thread(os.path.getsize, body), sha256):
            _log.warning("archive.replaced_rotten_object", object=name)
            await store.put(name, body, sha256, overwrite=True)


async def _holds(store: Store, name: str, size: int, sha256: bytes) -> bool:
    found, left = hashlib.sha256(), size
    async with aclosing(store.get(name)) as chunks:
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                return False
            await asyncio.to_thread(found.update, chunk)
    return left == 0 and found.digest() == sha256


@asynccontextmanager
async def spooled(folder: Path) -> AsyncIterator[BinaryIO]:
    """A file in `folder`, for the block."""
    file = await asyncio.to_thread(_open_spool, folder)
    try:
        yield file
    finally:
        file.close()
        await asyncio.to_thread(Path(file.name).unlink, missing_ok=True)


def _open_spool(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return cast(BinaryIO, tempfile.NamedTemporaryFile(dir=folder, prefix="object-", delete=False))


def clean_spool(folder: Path) -> None:
    """Remove what a run that was killed left; called under the lock of those who write there."""
    for path in folder.glob("object-*"):
        path.unlink(missing_ok=True)


class _Stream:
    """The CSV on its way: hashed whole, compressed, cut into objects. Pieces end at a row's end, as COPY sends them."""

    def __init__(self, source: Source, store: Store, spool: Path, object_bytes: int, at: Callable[[str], None]) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.objects: list[Object] = []
        self._source, self._store, self._spool, self._object_bytes, self._at = source, store, spool, object_bytes, at
        self._part: _Part | None = None
        self._error: Exception | None = None

    async def take(self, piece: bytes) -> None:
        """A piece of the CSV. What goes wrong is raised by `finish`, and the rest thrown away: asyncpg (0.32) cancels a
        COPY whose reader raises, and where that had ended already it waits for an answer that never comes."""
        if self._error:
            return
        try:
            await asyncio.to_thread(self._write, piece)
            if self._part and self._part.bytes >= self._object_bytes:
                await self._store_part()
        except Exception as error:
            self._error = error

    def _write(self, piece: bytes) -> None:
        self.sha256.update(piece)
        self.bytes += len(piece)
        if self._part is None:
            self._part = _Part(_open_spool(self._spool))
        self._part.write(piece)

    async def finish(self) -> None:
        """Store what is left. Raises what went wrong on the way: OSError or StoreError."""
        if self._error:
            raise self._error
        if self._part is not None:
            await self._store_part()

    async def _store_part(self) -> None:
        part = self._part
        assert part is not None  # noqa: S101 - called where there is one
        await asyncio.to_thread(part.end)
        digest = part.sha256.digest()
        name = object_name(self._source.partition, self._source.kind, len(self.objects), digest.hex())
        await put(self._store, name, part.path, digest)
        self.objects.append(Object(name=name, bytes=part.bytes, sha256=digest.hex()))
        self.close()
        self._at("object stored")

    def close(self) -> None:
        """Remove the spool file."""
        part, self._part = self._part, None
        if part is not None:
            part.close()


class _Part:
    """One object in the making, a zstd frame of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.path = Path(file.name)
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._file = file
        how = zstandard.ZstdCompressionParameters.from_level(
            LEVEL, window_log=WINDOW_LOG, min_match=MIN_MATCH, write_checksum=True
        )
        self._compress = zstandard.ZstdCompressor(compression_params=how).compressobj()

    def write(self, piece: bytes) -> None:
        """Compress `piece`."""
        self._put(self._compress.compress(piece))

    def end(self) -> None:
        """End the frame; the file is whole."""
        self._put(self._compress.flush())
        self._file.flush()

    def _put(self, compressed: bytes) -> None:
        self._file.write(compressed)
        self.sha256.update(compressed)
        self.bytes += len(compressed)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)
