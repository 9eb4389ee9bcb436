"""Connections that a fault can cut, and their state according to PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nexhb import partitions
from nexhb.postgres.connections import Connection, Database
from tests.timelapse.ledger import BrokenPromise

NIGHTLY = "nexhb nightly"  # the application name of the nightly run's connection
_TIMEOUT_S = 20.0
_SESSION = "pg_stat_activity WHERE datname = current_database() AND application_name = $1"


@dataclass(frozen=True)
class WatchedDatabase(Database):
    """A database that passes each new connection to the watcher of its application name in `watchers`."""

    watchers: dict[str, Callable[[Connection], None]] = field(default_factory=dict)

    async def connect(self, *, application: str, **options: Any) -> Connection:
        """Connect (see Database), and call the watcher."""
        conn = await super().connect(application=application, **options)
        if watch := self.watchers.get(application):
            watch(conn)
        return conn


async def wait_until_gone(conn: Connection, application: str) -> None:
    """Wait until the backend of this application's connection has ended."""
    await _until(conn, f"SELECT NOT EXISTS (SELECT FROM {_SESSION})", application)


async def wait_for_detach(conn: Connection) -> int:
    """Wait until the nightly run's DETACH waits for a lock. Return its backend's pid."""
    await _until(
        conn,
        f"SELECT EXISTS (SELECT FROM {_SESSION} AND wait_event_type = 'Lock' AND query LIKE '%DETACH%')",
        NIGHTLY,
    )
    return int(await conn.fetchval(f"SELECT pid FROM {_SESSION}", NIGHTLY))


async def _until(conn: Connection, query: str, *args: object) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not await conn.fetchval(query, *args):
        if time.monotonic() > deadline:
            raise BrokenPromise(f"Not true after {_TIMEOUT_S:.0f} s: {' '.join(query.split())} {args}")
        await asyncio.sleep(0.005)


@contextmanager
def lock_timeout(ms: int) -> Iterator[None]:
    """For the block, set the lock timeout of DDL: short to save time, or long enough for a detach to be interrupted."""
    before = partitions.LOCK_TIMEOUT_MS
    partitions.LOCK_TIMEOUT_MS = ms
    try:
        yield
    finally:
        partitions.LOCK_TIMEOUT_MS = before
