"""Objects of an archive's store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nexhb.archive.store import Store

NAME = "2026-03-01/heartbeats-0001.copy.zst"


@dataclass(frozen=True)
class Body:
    """A file and its digest."""

    path: Path
    content: bytes

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.content).digest()


def body_of(folder: Path, content: bytes, name: str = "body") -> Body:
    path = folder / name
    path.write_bytes(content)
    return Body(path, content)


async def read(store: Store, name: str) -> bytes:
    return b"".join([chunk async for chunk in store.get(name)])
