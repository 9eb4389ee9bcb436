"""What operators ask, answered from device_last_status by index; on a pool of its own, so that a heavy read never
holds up ingest. Times are arguments."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from nexhb import metrics, sql
from nexhb.db import Pool
from nexhb.errors import DatabaseUnavailable, UnknownDevice
from nexhb.pgerrors import is_retryable

_Q = sql.queries("reads")

SEEN_WITHIN = timedelta(hours=24)  # a device silent for longer is offline, not "Unity down"
ACQUIRE_TIMEOUT_S = 5.0

Row = dict[str, Any]


class Reads:
    """The reads, over a bounded pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def fleet(self, now: datetime, offline_after: timedelta) -> Row:
        """Counts: devices, online, offline, unity_down, inactive (silent for longer than the retention), never_seen."""
        async with self._asking("fleet") as conn:
            row = await conn.fetchrow(_Q["fleet"], now - offline_after, now - SEEN_WITHIN)
        return dict(row or {})

    async def devices(self, after: str, limit: int) -> list[Row]:
        """A page of status rows by device_id, from behind `after`."""
        async with self._asking("devices") as conn:
            return _rows(await conn.fetch(_Q["devices"], after, limit))

    async def device(self, device_id: str) -> Row:
        """One device and its last status. Raises UnknownDevice."""
        async with self._asking("device") as conn:
            row = await conn.fetchrow(_Q["device"], device_id)
        if row is None:
            raise UnknownDevice(f"{device_id!r}.")
        return dict(row)

    async def offline(self, now: datetime, silent_for: timedelta, limit: int) -> tuple[int, list[Row]]:
        """How many have been silent for longer than that, and the first `limit` of them, longest silent first."""
        cutoff = now - silent_for
        async with self._asking("offline") as conn:
            rows = _rows(await conn.fetch(_Q["offline"], cutoff, limit))
            count = await conn.fetchval(_Q["offline_count"], cutoff) if len(rows) == limit else len(rows)
        for row in rows:
            row["offline_seconds"] = int((now - row["last_ts"]).total_seconds())
        return int(count or 0), rows

    async def unity_down(self, now: datetime, limit: int) -> tuple[int, list[Row]]:
        """How many were seen within 24 h with Unity not running, and the first `limit`, newest first."""
        since = now - SEEN_WITHIN
        async with self._asking("unity_down") as conn:
            rows = _rows(await conn.fetch(_Q["unity_down"], since, limit))
            count = await conn.fetchval(_Q["unity_down_count"], since) if len(rows) == limit else len(rows)
        return int(count or 0), rows

    async def history(self, device_id: str, start: datetime, end: datetime, limit: int) -> list[Row]:
        """Its heartbeats with start ≤ ts < end, newest first. Raises UnknownDevice."""
        async with self._asking("history") as conn:
            device_no = await conn.fetchval(_Q["device_no"], device_id)
            if device_no is None:
                raise UnknownDevice(f"{device_id!r}.")
            return _rows(await conn.fetch(_Q["history"], device_no, start, end, limit))

    @asynccontextmanager
    async def _asking(self, query: str) -> AsyncIterator[PoolConnectionProxy]:
        """A connection of the pool, the time it takes as a metric, the database's absence as DatabaseUnavailable."""
        started = time.perf_counter()
        try:
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
                yield conn
        except Exception as error:
            if is_retryable(error):
                raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
            raise
        metrics.last_status_read_latency_ms.labels(query=query).observe((time.perf_counter() - started) * 1000)


def _rows(records: list[asyncpg.Record]) -> list[Row]:
    return [dict(record) for record in records]
