"""A store (or a full spool) that failed while COPY was still handing over rows: asyncpg 0.32 then cancels a statement
that may have ended already, and waits for the answer for ever. The nightly run stood still for an hour, and lost its
lock. The time-lapse found it; now the rest of the COPY is read and thrown away, and the error comes behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from nexhb import partitions
from nexhb.archive.export import Source, export
from nexhb.db import Connection
from nexhb.errors import StoreError
from tests.unit.beats import NOON


class RefusingStore:
    """Takes so many objects, and no more."""

    def __init__(self, takes: int) -> None:
        self._takes = takes
        self.refused = False

    async def put(self, name: str, _body: Path, _sha256: bytes, *, overwrite: bool = False) -> None:
        """See Store."""
        await asyncio.sleep(0.02)
        self._takes -= 1
        if self._takes < 0:
            self.refused = True
            raise StoreError(f"{name} is not wanted, overwrite: {overwrite}.")

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """See Store."""
        yield name.encode()

    def url(self, name: str) -> str:
        """See Store."""
        return name

    def name_of(self, url: str) -> str:
        """See Store."""
        return url


async def test_a_store_that_refuses_in_the_middle_of_a_day_stops_its_archive_and_not_the_run(
    conn: Connection, tmp_path: Path
) -> None:
    day = NOON.date()
    [name] = (await partitions.ensure(conn, [day])).values()
    await conn.execute(
        """INSERT INTO device_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong)
           SELECT $1::timestamptz, $1, n, 0, 1, false FROM generate_series(1, 500) n""",
        NOON,
    )
    start = partitions.midnight(day)
    source = Source(name, "day", name, start, start + timedelta(days=1))
    takes, refused = 0, True
    while refused:  # a piece of the COPY is an object here: each of them is refused once, and at last none is
        store = RefusingStore(takes)
        with suppress(StoreError):
            await export(conn, source, store, tmp_path, object_bytes=0)
        assert await conn.fetchval("SELECT 1", timeout=5) == 1
        takes, refused = takes + 1, store.refused
    assert takes > 2
