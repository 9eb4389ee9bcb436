"""The journal of the devices: each entry is on disk before its device continues. The check compares the journal with
the database."""

from __future__ import annotations

import asyncio
import enum
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from tests.faults.heartbeats import Heartbeat


class Event(enum.StrEnum):
    """What happened to a heartbeat."""

    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    DEDUPLICATED = "deduplicated"  # acknowledged: its bucket already has a row
    REFUSED = "refused"  # 503 before the daemon accepted it, or no connection: it cannot be stored
    UNKNOWN = "unknown"  # no response, half a response, or 503 after the writer received it: it may be stored
    REJECTED = "rejected"  # 4xx, which a healthy device must never receive
    DISCARDED = "discarded"  # the device no longer holds it: too many, too old, or its storage was lost


ACKNOWLEDGED = (Event.ACKNOWLEDGED, Event.DEDUPLICATED)


class Entry(NamedTuple):
    """One line of the journal."""

    at_s: float  # on the machine's monotonic clock
    heartbeat: Heartbeat
    event: Event
    detail: str  # the status of the response, or why there is none

    def __str__(self) -> str:
        return f"{self.at_s:.3f},{self.heartbeat.device},{self.heartbeat.ts_us},{self.event},{self.detail}\n"


class Journal:
    """The journal. All lines that are added during a write to the disk are written by the next write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[Event] = Counter()
        self._lines: list[str] = []
        self._written: asyncio.Future[None] | None = None
        self._has_lines = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Journal]:
        """Create the file, and write added entries to it during the block."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        task = asyncio.create_task(self._write(file))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            os.write(file, "".join(self._lines).encode())
            os.close(file)

    async def add(self, heartbeats: Iterable[Heartbeat], event: Event, detail: str = "") -> None:
        """Record an event of these heartbeats; return when the entries are on disk."""
        now = time.monotonic()
        for heartbeat in heartbeats:
            self._lines.append(str(Entry(now, heartbeat, event, detail)))
            self.counts[event] += 1
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        self._has_lines.set()
        await asyncio.shield(self._written)

    async def _write(self, file: int) -> None:
        while True:
            await self._has_lines.wait()
            self._has_lines.clear()
            lines, self._lines = self._lines, []
            written, self._written = self._written, None
            await asyncio.to_thread(_append, file, "".join(lines).encode())
            if written is not None:
                written.set_result(None)


def _append(file: int, data: bytes) -> None:
    os.write(file, data)
    os.fdatasync(file)


def read(path: Path) -> Iterator[Entry]:
    """Yield the entries, oldest first, without a last line that is still being written."""
    with path.open(encoding="ascii") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            at_s, device, ts_us, event, detail = line.rstrip("\n").split(",", maxsplit=4)
            yield Entry(float(at_s), Heartbeat(int(device), int(ts_us)), Event(event), detail)
