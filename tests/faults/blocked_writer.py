"""Block the writer in the middle of a transaction, and detect that it is blocked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from tests.faults.nemesis import NotPossible
from tests.faults.world import World

UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
POLL_S = 0.01
_WAITING = """
SELECT pid FROM pg_stat_activity
WHERE application_name = 'nexhb writer' AND wait_event_type = 'Lock' AND datname = current_database()
"""


@asynccontextmanager
async def writer_blocked(world: World, table: str, timeout_s: float) -> AsyncIterator[list[int]]:
    """Lock the table for the block. Yield the PIDs of the writers' backends that wait for the lock, as soon as there is
    such a backend, or an empty list after `timeout_s` seconds. Raises NotPossible if the database cannot be reached."""
    try:
        async with world.connection(lock_timeout="2000", idle_in_transaction_session_timeout="15000") as conn:
            await conn.execute("BEGIN")
            await conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield await _waiting(conn, timeout_s)
            with suppress(*UNREACHABLE):
                await conn.execute("ROLLBACK")
    except UNREACHABLE as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error


async def _waiting(conn: asyncpg.Connection, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while not (rows := await conn.fetch(_WAITING)) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return [row["pid"] for row in rows]
