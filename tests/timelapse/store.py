"""A folder of archives that fails when it is told to."""

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
    """What the store does once; named as the table names it."""

    REFUSES_OBJECT = "storage refuses an object"
    REFUSES_MANIFEST = "storage refuses only the manifest"
    STORES_BUT_FAILS = "storage stores, and says that it failed"
    STORES_ROT = "storage stores rotten bytes of an object"
    STORES_ROTTEN_MANIFEST = "storage stores a rotten manifest"
    GIVES_FLIPPED = "storage gives a flipped byte"
    GIVES_CUT = "storage gives a truncated object"
    GIVES_OTHER = "storage gives another object"


_MANIFEST = (Fault.REFUSES_MANIFEST, Fault.STORES_ROTTEN_MANIFEST)
_PUTS = (Fault.REFUSES_OBJECT, Fault.STORES_BUT_FAILS, Fault.STORES_ROT, *_MANIFEST)


def flipped(raw: bytes, at: int) -> bytes:
    """One bit of it is another."""
    at %= len(raw)
    return raw[:at] + bytes((raw[at] ^ 0x10,)) + raw[at + 1 :]


async def _nothing(_name: str) -> None:
    """Nothing happens meanwhile."""


class UnreliableStore:
    """A FolderStore with one fault at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.armed: Fault | None = None  # disarmed by the operation that it spoils
        self.kind = "day"  # of the archive that it spoils: day | late
        self.last_put = ""
        self.meanwhile: Callable[[str], Awaitable[None]] = _nothing  # during each put
        self._inner = FolderStore(folder, timeout_s=30)
        self._fresh: set[str] = set()  # stored in this run
        self._compared = ""  # an object that was there already: export looks whether it is the same

    def arm(self, fault: Fault | None, kind: str) -> None:
        """Spoil the next operation on an archive of that kind."""
        self.armed, self.kind = fault, kind
        self._fresh.clear()

    async def put(self, name: str, body: Path, sha256: bytes, *, overwrite: bool = False) -> None:
        """See Store."""
        self.last_put = name
        await self.meanwhile(name)
        fault = self.armed
        self._fresh.add(name)
        if fault not in _PUTS or name.endswith(".json") != (fault in _MANIFEST) or f"/{self.kind}-" not in name:
            return await self._put(name, body, sha256, overwrite)
        self.armed = None
        if fault in (Fault.STORES_ROT, Fault.STORES_ROTTEN_MANIFEST):
            return await self._put_rotten(name, body)
        if fault is Fault.STORES_BUT_FAILS:
            await self._inner.put(name, body, sha256, overwrite=True)
        raise StoreError(f"put {name}: out of order.")

    async def _put(self, name: str, body: Path, sha256: bytes, overwrite: bool) -> None:
        try:
            await self._inner.put(name, body, sha256, overwrite=overwrite)
        except ObjectExists:
            self._compared = name
            raise

    async def _put_rotten(self, name: str, body: Path) -> None:
        raw = flipped(await asyncio.to_thread(body.read_bytes), 20)
        with tempfile.NamedTemporaryFile() as rotten:
            rotten.write(raw)
            rotten.flush()
            await self._inner.put(name, Path(rotten.name), hashlib.sha256(raw).digest(), overwrite=True)

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """See Store."""
        compared, self._compared = self._compared == name, ""
        fault = self.armed
        # Read back, just stored; what is read for another reason only where it is to be another object.
        spoiled = fault is not None and fault not in _PUTS and name.endswith(".zst") and not compared
        if not spoiled or f"/{self.kind}-" not in name or (name not in self._fresh and fault is not Fault.GIVES_OTHER):
            async for chunk in self._inner.get(name):
                yield chunk
            return
        self.armed = None
        raw = (self.folder / name).read_bytes()
        if fault is Fault.GIVES_CUT:
            yield raw[:-5]
        elif fault is Fault.GIVES_FLIPPED:
            yield flipped(raw, len(raw) // 2)
        else:
            others = sorted(path for path in self.folder.rglob("*.zst") if not name.endswith(path.name))
            yield others[0].read_bytes() if others else b""

    def url(self, name: str) -> str:
        """See Store."""
        return self._inner.url(name)

    def name_of(self, url: str) -> str:
        """See Store."""
        return self._inner.name_of(url)
