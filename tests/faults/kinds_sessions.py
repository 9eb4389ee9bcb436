"""What an operator, a monitor or a provider does to sessions: each of nexhb's is cancelled, or ended."""

from __future__ import annotations

import asyncio
import time

from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

EVERY_S = 0.05
_NEXHBS = "FROM pg_stat_activity WHERE application_name LIKE 'nexhb %' AND datname = current_database()"
_CANCEL = f"SELECT count(*) FILTER (WHERE pg_cancel_backend(pid)) {_NEXHBS} AND state <> 'idle'"
_TERMINATE = f"SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) {_NEXHBS}"
_TELL = "SELECT pg_notify('nexhb_devices', ''), pg_notify('nexhb_flags', '')"


async def _cancel(world: World, fault: Fault) -> None:
    """Those who listen read when they are told to; the tables are locked meanwhile, so that each is found at work."""
    try:
        async with world.connection(lock_timeout="2000", idle_in_transaction_session_timeout="5000") as holder:
            await holder.execute("BEGIN; LOCK TABLE device_tokens, feature_flags IN ACCESS EXCLUSIVE MODE")
            await _again_and_again(world, fault, _CANCEL)
    except UNREACHABLE as error:
        raise Unable(f"{type(error).__name__}: {error}") from error


async def _terminate(world: World, fault: Fault) -> None:
    try:
        await _again_and_again(world, fault, _TERMINATE)
    except UNREACHABLE as error:
        raise Unable(f"{type(error).__name__}: {error}") from error


async def _again_and_again(world: World, fault: Fault, do: str) -> None:
    until = time.monotonic() + fault.lasts_s
    done = 0
    async with world.connection() as conn:
        while time.monotonic() < until:
            await conn.execute(_TELL)
            done += await conn.fetchval(do)
            await asyncio.sleep(EVERY_S)
    if not done:
        raise Unable("no session of nexhb's was at work")


KINDS = (
    Kind("each session cancelled", "operators", (0.3, 1.5), _cancel),
    Kind("each session terminated", "operators", (0.1, 0.6), _terminate),
)
