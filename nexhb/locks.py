"""PostgreSQL advisory locks, each on a connection that its user owns: releasing a connection to a pool would
release its locks too."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from nexhb import sql
from nexhb.errors import LockHeld, LockLost

_Q = sql.queries("locks")
_GONE = (
    asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError,
    OSError,
)  # fmt: skip
_SPACE = 0x6E65786862 << 20  # "nexhb" in the upper bits: other users of the database keep theirs


class Lock(enum.IntEnum):
    """Every lock there is."""

    MIGRATE = _SPACE + 1
    PARTITIONS = _SPACE + 2
    NIGHTLY = _SPACE + 3
    RECONCILE = _SPACE + 4
    BACKFILL = _SPACE + 5
    IMPORT = _SPACE + 6


async def check(conn: asyncpg.Connection, lock: Lock) -> None:
    """Raise LockLost unless `conn` itself holds `lock` now: asked before each step that cannot be taken back."""
    if not await conn.fetchval(_Q["holds_lock"], int(lock)):
        raise LockLost(lock.name.lower())


@asynccontextmanager
async def held(conn: asyncpg.Connection, lock: Lock, *, wait: bool) -> AsyncIterator[None]:
    """Hold `lock` on `conn` for the block. Without `wait`, raises LockHeld where somebody else has it."""
    if wait:
        await conn.execute(_Q["wait_lock"], int(lock))
    elif not await conn.fetchval(_Q["try_lock"], int(lock)):
        raise LockHeld(lock.name.lower())
    try:
        yield
    finally:
        # With a connection that is lost, or is just being lost, the lock is gone too.
        with suppress(*_GONE):
            await conn.execute(_Q["unlock"], int(lock))


async def in_the_way(conn: asyncpg.Connection) -> str:
    """Whose transactions a lock on a table has waited for, as far as they can be seen still."""
    rows = await conn.fetch(_Q["in_the_way"])
    return "; ".join(map(_transaction, rows)) or "its lock was busy"


def _transaction(row: asyncpg.Record) -> str:
    if row["gid"] is not None:
        gid = row["gid"].replace("'", "''")
        return f"the prepared transaction {row['gid']} waits since {row['seconds']} s for ROLLBACK PREPARED '{gid}'"
    return f"pid {row['pid']} ({row['application_name'] or 'unnamed'}) is {row['state']} since {row['seconds']} s"
