"""What the devices write down, on disk before they do the next thing: their word against the database's."""

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

from tests.faults.beats import Beat


class What(enum.StrEnum):
    """What happened to a heartbeat."""

    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    DEDUPLICATED = "deduplicated"  # acknowledged: its bucket has its row
    REFUSED = "refused"  # 503 before it was taken, or no connection: it cannot be in
    UNKNOWN = "unknown"  # no answer, half an answer, or 503 behind the writer: it may be in
    TURNED_AWAY = "turned away"  # 4xx: nothing that a healthy device may ever hear
    GIVEN_UP = "given up"  # the device holds it no more: too many, too old, or its storage is gone


ACKNOWLEDGED = (What.ACKNOWLEDGED, What.DEDUPLICATED)


class Entry(NamedTuple):
    """One line."""

    at_s: float  # on the machine's monotonic clock
    beat: Beat
    what: What
    said: str  # the status, or why there is none

    def __str__(self) -> str:
        return f"{self.at_s:.3f},{self.beat.device},{self.beat.ts_us},{self.what},{self.said}\n"


class Record:
    """The file. Whoever waits while another's lines are on their way to the disk goes with the next ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[What] = Counter()
        self._lines: list[str] = []
        self._written: asyncio.Future[None] | None = None
        self._wanted = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Record]:
        """Take lines for the block."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        task = asyncio.create_task(self._write(file))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            os.write(file, "".join(self._lines).encode())
            os.close(file)

    async def add(self, beats: Iterable[Beat], what: What, said: str = "") -> None:
        """Write down what happened to these; returns when it is on disk."""
        now = time.monotonic()
        for beat in beats:
            self._lines.append(str(Entry(now, beat, what, said)))
            self.counts[what] += 1
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        self._wanted.set()
        await asyncio.shield(self._written)

    async def _write(self, file: int) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            lines, self._lines = self._lines, []
            written, self._written = self._written, None
            await asyncio.to_thread(_append, file, "".join(lines).encode())
            if written is not None:
                written.set_result(None)


def _append(file: int, data: bytes) -> None:
    os.write(file, data)
    os.fdatasync(file)


def read(path: Path) -> Iterator[Entry]:
    """Every line, oldest first; one that is just being written is none yet."""
    with path.open(encoding="ascii") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            at_s, device, ts_us, what, said = line.rstrip("\n").split(",", maxsplit=4)
            yield Entry(float(at_s), Beat(int(device), int(ts_us)), What(what), said)
