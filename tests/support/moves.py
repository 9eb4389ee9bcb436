"""A NexMDM database, a nexhb database, and imports from one into the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from bench.nexmdm import Version
from nexhb.nexmdm import importing
from nexhb.nexmdm import source as sources
from nexhb.nexmdm.importing import ImportResult, Options
from nexhb.postgres.connections import Connection, Database
from tests.support.nexmdm_rows import add_beat

OPTIONS = Options(days=7, rate=1_000_000, retention_days=90, bucket_s=10)
DAY = timedelta(days=1)


@dataclass
class Move:
    """The two databases of an import."""

    source: Connection
    to: Connection
    dsn: str
    now: datetime

    async def run(self, *, timezone: str | None = None, **changes: Any) -> ImportResult:
        """Run an import."""
        async with sources.opened(self.dsn, timezone) as source:
            return await importing.run(source, self.to, self.now, replace(OPTIONS, **changes), lambda *_: None)

    async def at(self, age: timedelta, device_id: str = "kiosk-1", **columns: Any) -> datetime:
        """Add a heartbeat to the NexMDM database."""
        await add_beat(self.source, device_id, self.now - age, **columns)
        return self.now - age

    async def history(self) -> list[Any]:
        """Return all heartbeats in nexhb."""
        rows: list[Any] = await self.to.fetch("SELECT * FROM heartbeat_history ORDER BY ts, device_id")
        return rows


@asynccontextmanager
async def moving(version: Version, old: Database, to: Connection, now: datetime) -> AsyncIterator[Move]:
    """Create an empty NexMDM database in `old`, with partitions up to `now`, and return the move."""
    source = await old.connect(application="test source")
    await version.create(source, now - 22 * DAY, now)
    yield Move(source, to, old.dsn, now)
    await source.close()
