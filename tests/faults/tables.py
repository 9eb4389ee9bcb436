"""Holding up the writer in mid-transaction, and knowing that it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from tests.faults.nemesis import Unable
from tests.faults.world import World

UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
LOOK_S = 0.01
_WAITING = """
SELECT pid FROM pg_stat_activity
WHERE application_name = 'nexhb writer' AND wait_event_type = 'Lock' AND datname = current_database()
"""


@asynccontextmanager
async def held_up(world: World, table: str, bound_s: float) -> AsyncIterator[list[int]]:
    """The table is locked for the block, which begins when a writer waits for it (or behind `bound_s`): the backends
    that wait. Raises Unable where the database is not there."""
    try:
        async with world.connection(lock_timeout="2000", idle_in_transaction_session_timeout="15000") as conn:
            await conn.execute("BEGIN")
            await conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield await _waiting(conn, bound_s)
            with suppress(*UNREACHABLE):
                await conn.execute("ROLLBACK")
    except UNREACHABLE as error:
        raise Unable(f"{type(error).__name__}: {error}") from error


async def _waiting(conn: asyncpg.Connection, bound_s: float) -> list[int]:
    deadline = time.monotonic() + bound_s
    while not (found := await conn.fetch(_WAITING)) and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_S)
    return [row["pid"] for row in found]
