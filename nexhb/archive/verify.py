"""Verify an archive: read every byte back and compare it with the manifest. A HEAD request or an
ETag would not show that the bytes are intact."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Container
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import zstandard

from nexhb.archive.manifest import COLUMNS, MAX_LINE_BYTES, MAX_MANIFEST_BYTES, STREAM_COLUMNS, Manifest, Object, decode
from nexhb.archive.packed import unpack
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged

# Limits of memory that hold whatever an archive contains: 1.9 MB of zstd can decompress to 2 GB.
READ_BYTES = 1 << 16  # compressed bytes that are read at a time
PIECE_BYTES = 1 << 18  # decompressed bytes that are returned at a time
MAX_WINDOW_BYTES = 8 << 20  # limit of the window of a zstd frame; format 1 uses half of this, the current format a 64th


async def load(store: Store, name: str, sha256: str) -> Manifest:
    """Return the manifest, after checking its SHA-256 (hex). Its object names are changed so that `store` can read the
    objects, also if the archive is in an earlier store.

    Raises ArchiveDamaged or StoreError.
    """
    raw = b""
    async with aclosing(store.get(name)) as chunks:
        async for chunk in chunks:
            raw += chunk
            if len(raw) > MAX_MANIFEST_BYTES:
                raise ArchiveDamaged(f"{name} is larger than a manifest can be.")
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ArchiveDamaged(f"{name} is not the manifest that was stored: its SHA-256 differs.")
    manifest = decode(raw)
    root = name[: -len("/".join(name.rsplit("/", 2)[-2:]))]  # empty unless the archive is in an earlier store
    objects = tuple(msgspec.structs.replace(item, name=root + item.name) for item in manifest.objects)
    return msgspec.structs.replace(manifest, objects=objects)


async def verify(store: Store, name: str, sha256: str, spool: Path | None = None) -> Manifest:
    """Read every object back, and return the manifest if all objects match it. Raises ArchiveDamaged or StoreError."""
    manifest = await load(store, name, sha256)
    async with aclosing(stream(store, manifest, spool)) as pieces:
        async for _ in pieces:
            pass
    return manifest


async def stream(store: Store, manifest: Manifest, spool: Path | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the CSV in pieces of at most PIECE_BYTES.

    Each object is fetched into an unnamed file in `spool`, and decompressed only if its SHA-256 is the one in the
    manifest. Raises ArchiveDamaged, possibly only after the last piece: do not trust the pieces before the end.
    """
    check = _StreamCheck(manifest)
    for item in manifest.objects:
        async with _fetched(store, item, spool) as file:
            reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(
                file, read_size=READ_BYTES, read_across_frames=True
            )
            while piece := await asyncio.to_thread(check.read, reader, item.name):
                yield piece
    check.finish()


class _StreamCheck:
    """The stream as read so far, checked against its manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._digest, self._size = hashlib.sha256(), 0
        # Bytes of the unfinished row so far, and 1 if they end inside quotes.
        self._open_bytes, self._in_quotes = 0, 0

    def read(self, reader: zstandard.ZstdDecompressionReader, name: str) -> bytes:
        """Return the next piece; empty at the object's end.

        Raises ArchiveDamaged if the stream is longer than the manifest says, or a row exceeds MAX_LINE_BYTES, because
        PostgreSQL would hold the whole row in memory.
        """
        try:
            piece: bytes = reader.read(PIECE_BYTES)
        except zstandard.ZstdError as error:
            raise ArchiveDamaged(f"{name} cannot be decompressed: {error}.") from error
        self._digest.update(piece)
        self._size += len(piece)
        if self._size > self._manifest.stream_bytes:
            raise ArchiveDamaged(f"{name} contains more than the manifest says.")
        end = _end_of_rows(piece, self._in_quotes)
        self._open_bytes = len(piece) - end if end else self._open_bytes + len(piece)
        self._in_quotes = (self._in_quotes + piece.count(b'"')) % 2
        if self._open_bytes > MAX_LINE_BYTES:
            raise ArchiveDamaged(f"{name} has a row of more than {MAX_LINE_BYTES} bytes.")
        return piece

    def finish(self) -> None:
        """Raise ArchiveDamaged unless the whole stream has the size and the SHA-256 in the manifest."""
        if (self._size, self._digest.hexdigest()) != (self._manifest.stream_bytes, self._manifest.stream_sha256):
            raise ArchiveDamaged(f"The rows in the archive of {self._manifest.partition} do not match its manifest.")


@asynccontextmanager
async def _fetched(store: Store, item: Object, spool: Path | None) -> AsyncIterator[BinaryIO]:
    """Fetch the object into an unnamed file and verify it. Yield the file, positioned at its start."""
    with await asyncio.to_thread(_unnamed_file, spool) as file:
        digest, size = hashlib.sha256(), 0

        def write(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        async with aclosing(store.get(item.name)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > item.bytes:
                    break
                await asyncio.to_thread(write, chunk)
        if size != item.bytes or digest.hexdigest() != item.sha256:
            raise ArchiveDamaged(f"{item.name} is not what was stored: its size ({size} bytes) or its SHA-256 differs.")
        file.seek(0)
        yield file


def _unnamed_file(spool: Path | None) -> BinaryIO:
    """Create a file that disappears with the process, however the process ends.

    If `spool` does not exist or belongs to another user, the file is in the system's temporary folder: a command that
    only reads must not create the spool folder.
    """
    usable = spool is not None and os.access(spool, os.W_OK | os.X_OK)
    return cast(BinaryIO, tempfile.TemporaryFile(dir=spool if usable else None))


async def rows(
    store: Store,
    manifest: Manifest,
    where: tuple[str, Container[str]] | None = None,
    spool: Path | None = None,
) -> AsyncGenerator[list[list[str]], None]:
    """Yield the heartbeats as texts in the order of COLUMNS, a few hundred at a time; an empty text stands for null.

    With `where`, yield only the heartbeats whose value in the given column (device_id or device_no) is among the given
    texts. Raises the same errors as `stream`.
    """
    columns = STREAM_COLUMNS[manifest.format]
    rest, is_header = b"", True
    async with aclosing(stream(store, manifest, spool)) as pieces:
        async for piece in pieces:
            parsed, rest = await asyncio.to_thread(_parse_rows, rest + piece, manifest)
            if parsed and is_header:
                if tuple(parsed[0]) != columns:
                    raise ArchiveDamaged(f"The archive of {manifest.partition} has unexpected columns.")
                parsed, is_header = parsed[1:], False
            if where is not None:
                index, values = columns.index(where[0]), where[1]
                parsed = [row for row in parsed if row[index] in values]
            if columns != COLUMNS:
                parsed = await asyncio.to_thread(_unpack_rows, parsed, manifest)
            yield parsed
    if rest:
        raise ArchiveDamaged(f"The archive of {manifest.partition} ends in the middle of a row.")


def _parse_rows(data: bytes, manifest: Manifest) -> tuple[list[list[str]], bytes]:
    """Return the result of `_whole_rows`. Raises ArchiveDamaged if `data` is not CSV with the format's columns."""
    try:
        parsed, rest = _whole_rows(data)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ArchiveDamaged(f"The archive of {manifest.partition} is not valid CSV: {error}.") from error
    if any(len(row) != len(manifest.columns) for row in parsed):
        raise ArchiveDamaged(f"The archive of {manifest.partition} has a row with the wrong number of columns.")
    return parsed, rest


def _unpack_rows(packed: list[list[str]], manifest: Manifest) -> list[list[str]]:
    try:
        return [unpack(row, manifest.columns, manifest.bucket_seconds or 0) for row in packed]
    except (ValueError, OverflowError) as error:
        raise ArchiveDamaged(f"A row of an archive is unreadable: {error}.") from error


def _whole_rows(data: bytes) -> tuple[list[list[str]], bytes]:
    """Return the rows that end in `data`, and the remaining bytes."""
    end = _end_of_rows(data)
    # Not with splitlines, which, unlike COPY, ends a line at U+2028 and the like; an SSID may contain these.
    return list(csv.reader(io.StringIO(data[:end].decode(), newline=""))), data[end:]


def _end_of_rows(data: bytes, in_quotes: int = 0) -> int:
    """Return the offset after the last row that ends in `data`; 0 if no row ends there.

    A line break inside quotes ends no row. `in_quotes` is 1 if `data` begins inside quotes.
    """
    end = data.rfind(b"\n") + 1
    in_quotes = (in_quotes + data.count(b'"', 0, end)) % 2
    while end and in_quotes:
        before = data.rfind(b"\n", 0, end - 1) + 1
        in_quotes = (in_quotes + data.count(b'"', before, end)) % 2  # no byte is searched for quotes more than twice
        end = before
    return end
