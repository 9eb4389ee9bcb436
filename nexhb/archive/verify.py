"""An archive read back: every byte of it, against its manifest. HEAD or an ETag would prove nothing."""

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

from nexhb.archive.manifest import MOST_BYTES, MOST_LINE_BYTES, STREAM_COLUMNS, Manifest, Object, decode
from nexhb.archive.packed import unpacked
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged

# What is held of an archive at a time, whatever it unpacks to: 1.9 MB of zstd can be 2 GB.
SLICE = 1 << 16  # compressed bytes
PIECE = 1 << 18  # unpacked bytes
MOST_WINDOW_BYTES = 8 << 20  # that a frame may ask to be kept: twice what the former format asks, 64 times today's


async def load(store: Store, name: str, sha256: str) -> Manifest:
    """The manifest, whose SHA-256 (hex) was written down, with its objects' names as `store` takes them.

    Raises ArchiveDamaged or StoreError.
    """
    raw = b""
    async with aclosing(store.get(name)) as chunks:
        async for chunk in chunks:
            raw += chunk
            if len(raw) > MOST_BYTES:
                raise ArchiveDamaged(f"{name} is larger than a manifest can be.")
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ArchiveDamaged(f"{name} is not the manifest that was written: its SHA-256 differs.")
    manifest = decode(raw)
    root = name[: -len("/".join(name.rsplit("/", 2)[-2:]))]  # empty but for an archive in a former store
    objects = tuple(msgspec.structs.replace(one, name=root + one.name) for one in manifest.objects)
    return msgspec.structs.replace(manifest, objects=objects)


async def verify(store: Store, name: str, sha256: str, spool: Path | None = None) -> Manifest:
    """The manifest, once every object was read back and found whole. Raises ArchiveDamaged or StoreError."""
    manifest = await load(store, name, sha256)
    async with aclosing(stream(store, manifest, spool)) as pieces:
        async for _ in pieces:
            pass
    return manifest


async def stream(store: Store, manifest: Manifest, spool: Path | None = None) -> AsyncGenerator[bytes, None]:
    """The CSV, in pieces of PIECE bytes at most. Each object is fetched whole into a nameless file in `spool`, and
    unpacked only once its SHA-256 is the manifest's. Raises ArchiveDamaged, at the latest behind the last piece: what
    was read until then is not to be believed before this ends."""
    taken = _Taken(manifest)
    for one in manifest.objects:
        async with _fetched(store, one, spool) as file:
            unpacking = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).stream_reader(
                file, read_size=SLICE, read_across_frames=True
            )
            while piece := await asyncio.to_thread(taken.next, unpacking, one):
                yield piece
    taken.end()


class _Taken:
    """What came of a stream so far, held against its manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._digest, self._size = hashlib.sha256(), 0
        self._open_bytes, self._within = 0, 0  # of the row that has no end yet; 1 within quotes

    def next(self, unpacking: zstandard.ZstdDecompressionReader, one: Object) -> bytes:
        """The next piece, empty at the object's end. Raises ArchiveDamaged for more than the manifest says, and for a
        row without an end: PostgreSQL keeps one in memory whole."""
        try:
            piece: bytes = unpacking.read(PIECE)
        except zstandard.ZstdError as error:
            raise ArchiveDamaged(f"{one.name} cannot be unpacked: {error}.") from error
        self._digest.update(piece)
        self._size += len(piece)
        if self._size > self._manifest.stream_bytes:
            raise ArchiveDamaged(f"{one.name}: there is more in it than the manifest says.")
        end = _end_of_rows(piece, self._within)
        self._open_bytes = len(piece) - end if end else self._open_bytes + len(piece)
        self._within = (self._within + piece.count(b'"')) % 2
        if self._open_bytes > MOST_LINE_BYTES:
            raise ArchiveDamaged(f"{one.name} has a row of more than {MOST_LINE_BYTES} bytes.")
        return piece

    def end(self) -> None:
        """Raises ArchiveDamaged where it was not all, or not it."""
        if (self._size, self._digest.hexdigest()) != (self._manifest.stream_bytes, self._manifest.stream_sha256):
            raise ArchiveDamaged(f"The archive of {self._manifest.partition} has other rows than its manifest says.")


@asynccontextmanager
async def _fetched(store: Store, one: Object, spool: Path | None) -> AsyncIterator[BinaryIO]:
    """The object in a file without a name, at its start, and what the manifest says that it is."""
    with await asyncio.to_thread(_nameless, spool) as file:
        digest, size = hashlib.sha256(), 0

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        async with aclosing(store.get(one.name)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > one.bytes:
                    break
                await asyncio.to_thread(take, chunk)
        if size != one.bytes or digest.hexdigest() != one.sha256:
            raise ArchiveDamaged(f"{one.name} is not what was stored: {size} bytes or its SHA-256 differ.")
        file.seek(0)
        yield file


def _nameless(spool: Path | None) -> BinaryIO:
    """A file that goes with its last user, however that ends. In the system's folder where `spool` is not there, or
    another user's: a command that only reads makes no folder there."""
    usable = spool is not None and os.access(spool, os.W_OK | os.X_OK)
    return cast(BinaryIO, tempfile.TemporaryFile(dir=spool if usable else None))


async def rows(
    store: Store,
    manifest: Manifest,
    where: tuple[str, Container[str]] | None = None,
    spool: Path | None = None,
) -> AsyncGenerator[list[list[str]], None]:
    """The heartbeats as texts in the order of COLUMNS, some hundred at a time; an empty text is null. `where`: only
    those whose column (device_id or device_no) is one of those texts. Raises as `stream` does."""
    columns = STREAM_COLUMNS[manifest.format]
    rest, head = b"", True
    async with aclosing(stream(store, manifest, spool)) as pieces:
        async for piece in pieces:
            found, rest = await asyncio.to_thread(_readable_rows, rest + piece, manifest)
            if found and head:
                if tuple(found[0]) != columns:
                    raise ArchiveDamaged(
                        f"The archive of {manifest.partition} has other columns than this nexhb knows."
                    )
                found, head = found[1:], False
            if where is not None:
                place, wanted = columns.index(where[0]), where[1]
                found = [row for row in found if row[place] in wanted]
            if manifest.bucket_seconds is not None:
                found = await asyncio.to_thread(_plain, found, manifest.bucket_seconds)
            yield found
    if rest:
        raise ArchiveDamaged(f"The archive of {manifest.partition} ends within a row.")


def _readable_rows(data: bytes, manifest: Manifest) -> tuple[list[list[str]], bytes]:
    """As `_whole_rows`. Raises ArchiveDamaged for what is no CSV of the format's columns."""
    try:
        found, rest = _whole_rows(data)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ArchiveDamaged(f"The archive of {manifest.partition} is no CSV: {error}.") from error
    if any(len(row) != len(manifest.columns) for row in found):
        raise ArchiveDamaged(f"The archive of {manifest.partition} has a row with other columns than the rest.")
    return found, rest


def _plain(found: list[list[str]], bucket_seconds: int) -> list[list[str]]:
    try:
        return [unpacked(row, bucket_seconds) for row in found]
    except (ValueError, OverflowError) as error:
        raise ArchiveDamaged(f"An archive's row cannot be read: {error}.") from error


def _whole_rows(data: bytes) -> tuple[list[list[str]], bytes]:
    """The rows that end in `data`, and what is left."""
    end = _end_of_rows(data)
    # Not splitlines: U+2028 and its like, which a network's name may hold, end a line for it, and none for COPY.
    return list(csv.reader(io.StringIO(data[:end].decode(), newline=""))), data[end:]


def _end_of_rows(data: bytes, within: int = 0) -> int:
    """Where the last row that ends in `data` does; 0 where none does. A line end within quotes is none; `within`: 1
    where `data` begins within quotes."""
    end = data.rfind(b"\n") + 1
    within = (within + data.count(b'"', 0, end)) % 2
    while end and within:
        before = data.rfind(b"\n", 0, end - 1) + 1
        within = (within + data.count(b'"', before, end)) % 2  # a byte is looked at twice, however many lines there are
        end = before
    return end
