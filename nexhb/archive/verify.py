"""An archive read back: every byte of it, against its manifest. HEAD or an ETag would prove nothing."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
from collections.abc import AsyncGenerator, Container
from contextlib import aclosing

import msgspec
import zstandard

from nexhb.archive.manifest import MOST_BYTES, STREAM_COLUMNS, Manifest, Object, decode
from nexhb.archive.packed import unpacked
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged

SLICE = 1 << 16  # compressed bytes unpacked at a time: rows that hardly differ shrink to a hundredth


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


async def verify(store: Store, name: str, sha256: str) -> Manifest:
    """The manifest, once every object was read back and found whole. Raises ArchiveDamaged or StoreError."""
    manifest = await load(store, name, sha256)
    async for _ in stream(store, manifest):
        pass
    return manifest


async def stream(store: Store, manifest: Manifest) -> AsyncGenerator[bytes, None]:
    """The CSV, in pieces. Raises ArchiveDamaged, at the latest behind the last piece: what was read until then is not
    to be believed before this ends."""
    whole, size = hashlib.sha256(), 0
    for one in manifest.objects:
        async with aclosing(_unpacked(store, one)) as pieces:
            async for piece in pieces:
                size += len(piece)
                if size > manifest.stream_bytes:
                    raise ArchiveDamaged(f"{one.name}: there is more in it than the manifest says.")
                await asyncio.to_thread(whole.update, piece)
                yield piece
    if size != manifest.stream_bytes or whole.hexdigest() != manifest.stream_sha256:
        raise ArchiveDamaged(f"The archive of {manifest.partition} has other rows than its manifest says.")


async def _unpacked(store: Store, one: Object) -> AsyncGenerator[bytes, None]:
    digest, size = hashlib.sha256(), 0
    unpack = zstandard.ZstdDecompressor().decompressobj()

    def take(part: bytes) -> bytes:
        digest.update(part)
        if unpack.eof:
            raise ArchiveDamaged(f"{one.name}: there is something behind its end.")
        return unpack.decompress(part)

    try:
        async with aclosing(store.get(one.name)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > one.bytes:
                    break
                for start in range(0, len(chunk), SLICE):
                    yield await asyncio.to_thread(take, chunk[start : start + SLICE])
    except zstandard.ZstdError as error:
        raise ArchiveDamaged(f"{one.name} cannot be unpacked: {error}.") from error
    if size != one.bytes or digest.hexdigest() != one.sha256 or not unpack.eof:
        raise ArchiveDamaged(f"{one.name} is not what was stored: {size} bytes or its SHA-256 differ.")


async def rows(
    store: Store, manifest: Manifest, where: tuple[str, Container[str]] | None = None
) -> AsyncGenerator[list[list[str]], None]:
    """The heartbeats as texts in the order of COLUMNS, some thousand at a time; an empty text is null. `where`: only
    those whose column (device_id or device_no) is one of those texts. Raises as `stream` does."""
    columns = STREAM_COLUMNS[manifest.format]
    rest, head = b"", True
    async for piece in stream(store, manifest):
        found, rest = await asyncio.to_thread(_whole_rows, rest + piece)
        if found and head:
            if tuple(found[0]) != columns:
                raise ArchiveDamaged(f"The archive of {manifest.partition} has other columns than this nexhb knows.")
            found, head = found[1:], False
        if where is not None:
            place, wanted = columns.index(where[0]), where[1]
            found = [row for row in found if row[place] in wanted]
        if manifest.bucket_seconds is not None:
            found = await asyncio.to_thread(_plain, found, manifest.bucket_seconds)
        yield found
    if rest:
        raise ArchiveDamaged(f"The archive of {manifest.partition} ends within a row.")


def _plain(found: list[list[str]], bucket_seconds: int) -> list[list[str]]:
    try:
        return [unpacked(row, bucket_seconds) for row in found]
    except ValueError as error:
        raise ArchiveDamaged(f"An archive's row cannot be read: {error}.") from error


def _whole_rows(data: bytes) -> tuple[list[list[str]], bytes]:
    """The rows that end in `data`, and what is left. A line end within quotes is none."""
    end = data.rfind(b"\n") + 1
    while end and data.count(b'"', 0, end) % 2:
        end = data.rfind(b"\n", 0, end - 1) + 1
    # Not splitlines: U+2028 and its like, which a network's name may hold, end a line for it, and none for COPY.
    return list(csv.reader(io.StringIO(data[:end].decode(), newline=""))), data[end:]
