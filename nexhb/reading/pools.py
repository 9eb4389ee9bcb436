"""The connection pools of operators' reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from nexhb.config import Settings
from nexhb.postgres.connections import Database
from nexhb.postgres.identity import DatabaseTracker
from nexhb.reading.history import HISTORY_SESSION, HistoryReader
from nexhb.reading.reads import PooledReader, Reads


@asynccontextmanager
async def open_readers(
    settings: Settings, database: Database, tracker: DatabaseTracker
) -> AsyncIterator[tuple[Reads, PooledReader]]:
    """Open the readers for operators: from the last status and from the history, each with its own pool."""
    pool = await database.pool(
        application="nexhb reads",
        size=settings.database.read_pool_size,
        timeout_s=settings.database.read_timeout_seconds,
    )
    history_pool = await database.pool(
        application="nexhb legacy reads",
        size=settings.reads.legacy_pool_size,
        timeout_s=settings.reads.legacy_timeout_seconds,
        **HISTORY_SESSION,
    )
    expiring: set[asyncio.Future[None]] = set()  # references to the tasks: the event loop has only weak ones

    def expire() -> None:
        """Replace the connections, because they lead to the previous database."""
        for each in (pool, history_pool):
            task = asyncio.ensure_future(each.expire_connections())
            expiring.add(task)
            task.add_done_callback(expiring.discard)

    tracker.on_change(expire)
    interval = timedelta(seconds=settings.heartbeat.interval_seconds)
    history_reader = HistoryReader(timedelta(days=settings.partitions.retention_days))
    try:
        yield Reads(pool, interval), PooledReader(history_pool, history_reader, interval)
    finally:
        history_pool.terminate()
        pool.terminate()
