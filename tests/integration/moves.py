"""A NexMDM database beside one of nexhb's, and imports from the one into the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from bench.nexmdm import Version, add_beat
from nexhb.db import Connection, Database
from nexhb.legacy import importing
from nexhb.legacy import source as sources
from nexhb.legacy.importing import Imported, Options

OPTIONS = Options(days=7, rate=1_000_000, retention_days=90, bucket_s=10)
DAY = timedelta(days=1)


@dataclass
class Move:
    """Both sides."""

    source: Connection
    to: Connection
    dsn: str
    now: datetime

    async def run(self, *, timezone: str | None = None, **changes: Any) -> Imported:
        """An import."""
        async with sources.opened(self.dsn, timezone) as source:
            return await importing.run(source, self.to, self.now, replace(OPTIONS, **changes), lambda *_: None)

    async def at(self, age: timedelta, device_id: str = "kiosk-1", **columns: Any) -> datetime:
        """One heartbeat of the old system."""
        await add_beat(self.source, device_id, self.now - age, **columns)
        return self.now - age

    async def history(self) -> list[Any]:
        """All that nexhb has."""
        rows: list[Any] = await self.to.fetch("SELECT * FROM heartbeat_history ORDER BY ts, device_id")
        return rows


@asynccontextmanager
async def moving(version: Version, old: Database, to: Connection, now: datetime) -> AsyncIterator[Move]:
    """An empty NexMDM database in `old`, with days up to `now`."""
    source = await old.connect(application="test source")
    await version.create(source, now - 22 * DAY, now)
    yield Move(source, to, old.dsn, now)
    await source.close()
