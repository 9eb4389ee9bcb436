"""Export a table of heartbeats as the objects and the manifest of an archive, in constant memory.

COPY delivers the bytes in the socket, about 25 kB at a time. A thread hashes each piece, compresses it and writes it to
a spool file, so that the event loop stays free for heartbeats. Larger pieces, or fetching a piece while the previous
piece is being compressed, made no measurable difference: PostgreSQL is the bottleneck. Each spool file becomes one
object, stored under a name made from its hash, and is then deleted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from nexhb import log
from nexhb.archive.manifest import PACKED, Manifest, Object, added_to, encode, manifest_name, object_name
from nexhb.archive.store import Store
from nexhb.errors import ObjectExists
from nexhb.partitions import quoted
from nexhb.postgres import migrate, sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("archive")
_log = log.get("archive")

OBJECT_BYTES = 240 << 20  # compressed size at which an object ends; with the compressor's buffer, below 256 MiB

# Bytes per row, and seconds of one core, for a day of 2,000 varied devices at 60 s ± 15 s: 2.88 million rows, 481 MB of
# CSV (for level 19, a fifth of the CSV was measured and the time multiplied by five):
#
#   window                level 3        level 6        level 9        level 12        level 19
#   default               19.63, 0.9 s   17.82, 2.6 s   17.29, 5.2 s   17.10, 11.1 s   15.35, 252 s
#   128 KiB               18.72, 0.6 s   17.14, 2.2 s   16.60, 3.6 s   16.58,  7.0 s   15.28, 129 s
#   128 KiB, matches ≥ 6  18.16, 0.6 s   16.72, 2.2 s   16.42, 3.4 s   16.42,  6.5 s   15.37, 118 s
#
# A device's rows resemble each other, but not the rows of other devices. So a window of more than half a day of one
# device costs time, and bytes to encode longer distances (32 MiB, matches ≥ 6: 17.11, 6.8 s). Matches shorter than six
# bytes occur in random digits, and encoding such a match costs more than the digits. docs/archive.md lists the
# cost of each column.
LEVEL = 9
WINDOW_LOG = 17
MIN_MATCH = 6

BUCKET_SECONDS = 10  # the default of ingest.bucket_seconds


@dataclass(frozen=True)
class ArchivedTable:
    """A table to archive."""

    table: str
    kind: str  # day | late
    partition: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class StoredArchive:
    """An archive that was stored, but not yet read back."""

    manifest: Manifest
    name: str  # name of the manifest
    sha256: str  # SHA-256 of the manifest, hex


def select(rows: str, bucket_seconds: int, columns: Sequence[str] = PACKED) -> str:
    """Return the query whose CSV is an archive's stream with these columns. `rows` is a plain table, or a query in
    parentheses."""
    query = _Q["packed"].replace("$added", added_to(columns))
    return query.replace("$rows", rows).replace("$bucket_seconds", str(bucket_seconds))


def select_table(table: str, bucket_seconds: int = BUCKET_SECONDS) -> str:
    """Return the query of `select` for a table of heartbeats."""
    return select(f"({_Q['spelled_out'].replace('$table', quoted(table))})", bucket_seconds)


async def export(
    conn: Connection,
    source: ArchivedTable,
    store: Store,
    spool: Path,
    *,
    bucket_seconds: int = BUCKET_SECONDS,
    object_bytes: int = OBJECT_BYTES,
    checkpoint: Callable[[str], None] = lambda _: None,
) -> StoredArchive:
    """Store every row of `source.table`. Raises StoreError if the store fails, or the database's error.

    `bucket_seconds` is the length of most rows' buckets; a row with another length is stored too, but takes more bytes.
    `spool` is a folder that holds one object at a time. `checkpoint` is called after each durable step.
    """
    await conn.execute(_Q["session"])
    stream = _Stream(source, store, spool, object_bytes, checkpoint)
    try:
        statement = select_table(source.table, bucket_seconds)
        status = await conn.copy_from_query(statement, output=stream.write, format="csv", header=True, encoding="utf-8")
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
        schema_version=migrate.find_migrations()[-1].version,
        bucket_seconds=bucket_seconds,
        columns=PACKED,
        rows=rows,
        min_ts=span["min_ts"],
        max_ts=span["max_ts"],
        stream_bytes=stream.bytes,
        stream_sha256=stream.sha256.hexdigest(),
        objects=tuple(stream.objects),
    )
    return await _store_manifest(manifest, store, spool, checkpoint)


async def _store_manifest(
    manifest: Manifest, store: Store, spool: Path, checkpoint: Callable[[str], None]
) -> StoredArchive:
    raw = encode(manifest)
    digest = hashlib.sha256(raw)
    name = manifest_name(manifest.partition, manifest.kind, digest.hexdigest())
    async with spooled(spool) as file:
        file.write(raw)
        file.flush()
        await put(store, name, Path(file.name), digest.digest())
    checkpoint("manifest stored")
    return StoredArchive(manifest, name, digest.hexdigest())


async def put(store: Store, name: str, body: Path, sha256: bytes) -> None:
    """Store `body` unless the store has it already. The name contains the hash of the content, so an existing object
    with other content is corrupt, and is replaced."""
    try:
        await store.put(name, body, sha256)
    except ObjectExists:
        if not await _holds(store, name, await asyncio.to_thread(os.path.getsize, body), sha256):
            _log.warning("archive.replaced_rotten_object", object=name)
            await store.put(name, body, sha256, overwrite=True)


async def _holds(store: Store, name: str, size: int, sha256: bytes) -> bool:
    digest, left = hashlib.sha256(), size
    async with aclosing(store.get(name)) as chunks:
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                return False
            await asyncio.to_thread(digest.update, chunk)
    return left == 0 and digest.digest() == sha256


@asynccontextmanager
async def spooled(folder: Path) -> AsyncIterator[BinaryIO]:
    """Open a new file in `folder`, and delete it at the end of the block."""
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
    """Delete the files that a killed run left. The caller holds the lock of the runs that write to `folder`."""
    for path in folder.glob("object-*"):
        path.unlink(missing_ok=True)


class _Stream:
    """Hashes the whole CSV, compresses it and cuts it into objects. Each piece of the CSV ends at the end of a row,
    because COPY sends whole rows."""

    def __init__(
        self, source: ArchivedTable, store: Store, spool: Path, object_bytes: int, checkpoint: Callable[[str], None]
    ) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.objects: list[Object] = []
        self._source, self._store, self._spool = source, store, spool
        self._object_bytes, self._checkpoint = object_bytes, checkpoint
        self._part: _Part | None = None
        self._error: Exception | None = None

    async def write(self, piece: bytes) -> None:
        """Process a piece of the CSV. After an error, which `finish` raises, further pieces are discarded.

        This method must not raise. asyncpg (0.32) cancels a COPY whose reader raises; if that COPY has ended already,
        asyncpg waits for a reply that never comes.
        """
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
        """Store the last object. Raises the first error of any piece: OSError or StoreError."""
        if self._error:
            raise self._error
        if self._part is not None:
            await self._store_part()

    async def _store_part(self) -> None:
        part = self._part
        assert part is not None  # noqa: S101 - the callers checked it
        await asyncio.to_thread(part.end)
        digest = part.sha256.digest()
        name = object_name(self._source.partition, self._source.kind, len(self.objects), digest.hex())
        await put(self._store, name, part.path, digest)
        self.objects.append(Object(name=name, bytes=part.bytes, sha256=digest.hex()))
        self.close()
        self._checkpoint("object stored")

    def close(self) -> None:
        """Delete the spool file."""
        part, self._part = self._part, None
        if part is not None:
            part.close()


class _Part:
    """One object being written. Each object is a separate zstd frame."""

    def __init__(self, file: BinaryIO) -> None:
        self.path = Path(file.name)
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._file = file
        parameters = zstandard.ZstdCompressionParameters.from_level(
            LEVEL, window_log=WINDOW_LOG, min_match=MIN_MATCH, write_checksum=True
        )
        self._compress = zstandard.ZstdCompressor(compression_params=parameters).compressobj()

    def write(self, piece: bytes) -> None:
        """Compress `piece`."""
        self._put(self._compress.compress(piece))

    def end(self) -> None:
        """End the frame, which completes the file."""
        self._put(self._compress.flush())
        self._file.flush()

    def _put(self, compressed: bytes) -> None:
        self._file.write(compressed)
        self.sha256.update(compressed)
        self.bytes += len(compressed)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)
