"""An archive folder that fails on demand."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from nexhb.archive.file import FolderStore
from nexhb.errors import ObjectExists, StoreError


class Fault(enum.StrEnum):
    """A fault that the store has once. The values are shown in the report."""

    REJECTS_OBJECT = "store rejects an object"
    REJECTS_MANIFEST = "store rejects the manifest"
    STORES_BUT_FAILS = "store reports an error for a stored object"
    DAMAGES_OBJECT = "store damages an object"
    DAMAGES_MANIFEST = "store damages a manifest"
    RETURNS_DAMAGED = "store returns a damaged object"
    RETURNS_TRUNCATED = "store returns a truncated object"
    RETURNS_OTHER = "store returns another object"


_MANIFEST = (Fault.REJECTS_MANIFEST, Fault.DAMAGES_MANIFEST)
_PUTS = (Fault.REJECTS_OBJECT, Fault.STORES_BUT_FAILS, Fault.DAMAGES_OBJECT, *_MANIFEST)


def flipped(raw: bytes, at: int) -> bytes:
    """Return the bytes with one bit flipped."""
    at %= len(raw)
    return raw[:at] + bytes((raw[at] ^ 0x10,)) + raw[at + 1 :]


async def _nothing(_name: str) -> None:
    """Do nothing during a put."""


class UnreliableStore:
    """A FolderStore with one fault at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.armed: Fault | None = None  # reset by the operation that the fault affects
        self.kind = "day"  # kind of the archive that the fault affects: day | late
        self.last_put = ""
        self.meanwhile: Callable[[str], Awaitable[None]] = _nothing  # called during each put
        self._inner = FolderStore(folder, timeout_s=30)
        self._fresh: set[str] = set()  # names of objects stored since `arm`
        self._compared = ""  # name of an existing object, which the export reads to compare it

    def arm(self, fault: Fault | None, kind: str) -> None:
        """Make the next operation on an archive of this kind fail."""
        self.armed, self.kind = fault, kind
        self._fresh.clear()

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """Store an object, or fail."""
        self.last_put = name
        await self.meanwhile(name)
        fault = self.armed
        self._fresh.add(name)
        if fault not in _PUTS or name.endswith(".json") != (fault in _MANIFEST) or f"/{self.kind}-" not in name:
            return await self._put(name, body, sha256, overwrite)
        self.armed = None
        if fault in (Fault.DAMAGES_OBJECT, Fault.DAMAGES_MANIFEST):
            return await self._put_damaged(name, body)
        if fault is Fault.STORES_BUT_FAILS:
            await self._inner.put(name, body, sha256, overwrite=True)
        raise StoreError(f"put {name}: the disk is faulty.")

    async def _put(self, name: str, body: Path, sha256: bytes, overwrite: bool) -> None:
        try:
            await self._inner.put(name, body, sha256, overwrite=overwrite)
        except ObjectExists:
            self._compared = name
            raise

    async def _put_damaged(self, name: str, body: Path) -> None:
        raw = flipped(await asyncio.to_thread(body.read_bytes), 20)
        with tempfile.NamedTemporaryFile() as damaged:
            damaged.write(raw)
            damaged.flush()
            await self._inner.put(name, Path(damaged.name), hashlib.sha256(raw).digest(), overwrite=True)

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes, or wrong bytes."""
        compared, self._compared = self._compared == name, ""
        fault = self.armed
        # The fault affects the read-back of an object that was just stored; it affects other reads only if it returns
        # another object.
        is_affected = fault is not None and fault not in _PUTS and name.endswith(".zst") and not compared
        if (
            not is_affected
            or f"/{self.kind}-" not in name
            or (name not in self._fresh and fault is not Fault.RETURNS_OTHER)
        ):
            async for chunk in self._inner.get(name):
                yield chunk
            return
        self.armed = None
        raw = (self.folder / name).read_bytes()
        if fault is Fault.RETURNS_TRUNCATED:
            yield raw[:-5]
        elif fault is Fault.RETURNS_DAMAGED:
            yield flipped(raw, len(raw) // 2)
        else:
            others = sorted(path for path in self.folder.rglob("*.zst") if not name.endswith(path.name))
            yield others[0].read_bytes() if others else b""

    def url(self, name: str) -> str:
        """Return the object's URL."""
        return self._inner.url(name)

    def name_of(self, url: str) -> str:
        """Return the object's name."""
        return self._inner.name_of(url)
