"""What an operator, a monitor or a provider may do to sessions: cancel the statements of nexhb, or terminate its
sessions."""

from __future__ import annotations

import asyncio
import time

from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World

INTERVAL_S = 0.05
_SESSIONS = "FROM pg_stat_activity WHERE application_name LIKE 'nexhb %' AND datname = current_database()"
_CANCEL = f"SELECT count(*) FILTER (WHERE pg_cancel_backend(pid)) {_SESSIONS} AND state <> 'idle'"
_TERMINATE = f"SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) {_SESSIONS}"
_NOTIFY = "SELECT pg_notify('nexhb_devices', ''), pg_notify('nexhb_flags', '')"


async def _cancel(world: World, fault: Fault) -> None:
    """Cancel the statement of each active session. Listeners are notified, so that they read tables. Meanwhile these
    tables are locked, so that the queries of the listeners are still waiting when they are cancelled."""
    try:
        async with world.connection(lock_timeout="2000", idle_in_transaction_session_timeout="5000") as holder:
            await holder.execute("BEGIN; LOCK TABLE device_tokens, feature_flags IN ACCESS EXCLUSIVE MODE")
            await _repeat(world, fault, _CANCEL)
    except UNREACHABLE as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error


async def _terminate(world: World, fault: Fault) -> None:
    try:
        await _repeat(world, fault, _TERMINATE)
    except UNREACHABLE as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error


async def _repeat(world: World, fault: Fault, statement: str) -> None:
    deadline = time.monotonic() + fault.duration_s
    affected = 0
    async with world.connection() as conn:
        while time.monotonic() < deadline:
            await conn.execute(_NOTIFY)
            affected += await conn.fetchval(statement)
            await asyncio.sleep(INTERVAL_S)
    if not affected:
        raise NotPossible("no session of nexhb was active")


KINDS = (
    FaultKind("all statements cancelled", Lane.OPERATORS, (0.3, 1.5), _cancel),
    FaultKind("all sessions terminated", Lane.OPERATORS, (0.1, 0.6), _terminate),
)
