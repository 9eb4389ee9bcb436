"""A store fails, or the spool is full, while COPY is still delivering rows. asyncpg 0.32 then cancels a statement that
may have ended already, and waits for the response for ever. Formerly, the nightly run therefore hung for an hour, and
lost its lock; the time-lapse found this. Now nexhb reads and discards the rest of the COPY, and raises the error
afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from nexhb import partitions
from nexhb.archive.export import ArchivedTable, export
from nexhb.errors import StoreError
from nexhb.postgres.connections import Connection
from tests.conftest import SOON_S
from tests.support.heartbeats import NOON


class RefusingStore:
    """A store that accepts this many objects, and no more."""

    def __init__(self, takes: int) -> None:
        self._takes = takes
        self.refused = False

    async def put(self, name: str, _body: Path, _sha256: bytes, *, overwrite: bool = False) -> None:
        """Store the body, or refuse it."""
        await asyncio.sleep(0.02)
        self._takes -= 1
        if self._takes < 0:
            self.refused = True
            raise StoreError(f"{name} is refused, overwrite: {overwrite}.")

    async def get(self, name: str) -> AsyncGenerator[bytes, None]:
        """Return the object."""
        yield name.encode()

    def url(self, name: str) -> str:
        """Return the object's URL."""
        return name

    def name_of(self, url: str) -> str:
        """Return the object's name."""
        return url


async def test_a_store_that_fails_in_the_middle_of_a_day_fails_that_archive_and_not_the_run(
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
    source = ArchivedTable(name, "day", name, start, start + timedelta(days=1))
    takes, refused = 0, True
    while refused:  # one object per piece of the COPY; the n-th export fails at the n-th object
        store = RefusingStore(takes)
        with suppress(StoreError):
            await export(conn, source, store, tmp_path, object_bytes=0)
        assert await conn.fetchval("SELECT 1", timeout=SOON_S) == 1
        takes, refused = takes + 1, store.refused
    assert takes > 2
