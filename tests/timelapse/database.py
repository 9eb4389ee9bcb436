"""Connections that can be cut, and what PostgreSQL says of those who hold them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nexhb import partitions
from nexhb.db import CONNECT_TIMEOUT_S, Connection, Database
from tests.timelapse.ledger import Broken

NIGHTLY = "nexhb nightly"  # its connection's name
_PATIENCE_S = 20.0
_OURS = "pg_stat_activity WHERE datname = current_database() AND application_name = $1"


@dataclass(frozen=True)
class WatchedDatabase(Database):
    """Shows each connection that is made to `watchers`, by its name."""

    watchers: dict[str, Callable[[Connection], None]] = field(default_factory=dict)

    async def connect(
        self,
        *,
        application: str,
        command_timeout_s: float = 60.0,
        timeout_s: float = CONNECT_TIMEOUT_S,
        **settings: str | None,
    ) -> Connection:
        """See Database."""
        conn = await super().connect(
            application=application, command_timeout_s=command_timeout_s, timeout_s=timeout_s, **settings
        )
        if watch := self.watchers.get(application):
            watch(conn)
        return conn


async def gone(conn: Connection, application: str) -> None:
    """Wait until PostgreSQL has noticed that nobody is at the other end of that connection."""
    await _until(conn, f"SELECT NOT EXISTS (SELECT FROM {_OURS})", application)


async def detaching(conn: Connection) -> int:
    """Wait until the nightly run's DETACH waits for somebody; its backend."""
    await _until(
        conn,
        f"SELECT EXISTS (SELECT FROM {_OURS} AND wait_event_type = 'Lock' AND query LIKE '%DETACH%')",
        NIGHTLY,
    )
    return int(await conn.fetchval(f"SELECT pid FROM {_OURS}", NIGHTLY))


async def _until(conn: Connection, query: str, *args: object) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not await conn.fetchval(query, *args):
        if time.monotonic() > deadline:
            raise Broken(f"For {_PATIENCE_S:.0f} s not true: {' '.join(query.split())} {args}")
        await asyncio.sleep(0.005)


@contextmanager
def lock_timeout(ms: int) -> Iterator[None]:
    """DDL waits for so long: a reader that is never going to end need not be waited for."""
    before = partitions.LOCK_TIMEOUT_MS
    partitions.LOCK_TIMEOUT_MS = ms
    try:
        yield
    finally:
        partitions.LOCK_TIMEOUT_MS = before
