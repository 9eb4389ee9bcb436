"""PostgreSQL advisory locks. Each lock is held on a connection outside any pool, because returning a connection to a
pool would release its locks.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from nexhb.errors import LockHeld, LockLost
from nexhb.postgres import sql

_Q = sql.queries("locks")
_CONNECTION_LOST = (
    asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError,
    OSError,
)  # fmt: skip
_FIRST_KEY = 0x6E65786862 << 20  # "nexhb" in the upper bits, to avoid the keys of other applications


class Lock(enum.IntEnum):
    """The locks of nexhb."""

    MIGRATE = _FIRST_KEY + 1
    PARTITIONS = _FIRST_KEY + 2
    NIGHTLY = _FIRST_KEY + 3
    RECONCILE = _FIRST_KEY + 4
    BACKFILL = _FIRST_KEY + 5
    IMPORT = _FIRST_KEY + 6
    WATCH = _FIRST_KEY + 7


async def check(conn: asyncpg.Connection, lock: Lock) -> None:
    """Raise LockLost unless `conn` itself holds `lock`. Called before each irreversible step."""
    if not await conn.fetchval(_Q["holds_lock"], int(lock)):
        raise LockLost(lock.name.lower())


@asynccontextmanager
async def held(conn: asyncpg.Connection, lock: Lock, *, wait: bool) -> AsyncIterator[None]:
    """Hold `lock` on `conn` for the block. If `wait` is false and another connection holds it, raise LockHeld."""
    if wait:
        await conn.execute(_Q["wait_lock"], int(lock))
    elif not await conn.fetchval(_Q["try_lock"], int(lock)):
        raise LockHeld(lock.name.lower())
    try:
        yield
    finally:
        # If the connection is lost, or is being lost, PostgreSQL releases the lock.
        with suppress(*_CONNECTION_LOST):
            await conn.execute(_Q["unlock"], int(lock))


async def blocking_transactions(conn: asyncpg.Connection) -> str:
    """Describe the transactions that a lock on a table may have waited for, if they are still open."""
    rows = await conn.fetch(_Q["blocking_transactions"])
    return "; ".join(map(_transaction, rows)) or "its lock was busy"


def _transaction(row: asyncpg.Record) -> str:
    if row["gid"] is not None:
        gid = row["gid"].replace("'", "''")
        return f"the prepared transaction {row['gid']} has been open for {row['seconds']} s: ROLLBACK PREPARED '{gid}'"
    return f"pid {row['pid']} ({row['application_name'] or 'unnamed'}) has been {row['state']} for {row['seconds']} s"
