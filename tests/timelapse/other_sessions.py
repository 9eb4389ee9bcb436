"""Faults by other sessions: one holds the job's lock, a reader locks the parent table, somebody interrupts a detach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nexhb.jobs.plan import NightlyRules
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock
from tests.timelapse import jobs
from tests.timelapse.database import NIGHTLY, lock_timeout, wait_for_detach
from tests.timelapse.fault_kinds import FaultKind, always, has_attached_day
from tests.timelapse.jobs import TonightsPlan
from tests.timelapse.kills import RunNight
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.world import World

_SHORT_MS, _LONG_MS = 60, 20_000  # lock timeouts


async def _lock_held(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
    other = await world.database.connect(application="another daemon")
    try:
        await other.fetchval("SELECT pg_advisory_lock($1)", int(Lock.NIGHTLY))
        await _skipped(world, rules)
    finally:
        await other.close(timeout=5)
    return True


async def _skipped(world: World, rules: NightlyRules) -> None:
    done = await jobs.run(world, rules)
    if (done.status, done.reason) != ("skipped", "lock_held"):
        raise BrokenPromise(f"Another session held the lock, but the run is {done.status}: {done.reason}")


@asynccontextmanager
async def _reader(world: World) -> AsyncIterator[None]:
    """Run a report that reads the whole history, and leaves its transaction open."""
    conn = await world.database.connect(application="a long report")
    try:
        await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await conn.fetchval("SELECT count(*) FROM device_heartbeats")
        yield
    finally:
        await conn.close(timeout=5)


async def _pending(conn: Connection) -> int:
    return int(await conn.fetchval("SELECT count(*) FROM pg_inherits WHERE inhdetachpending"))


async def _reader_blocks_detach(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
    with lock_timeout(_SHORT_MS):
        async with _reader(world):
            await jobs.run_failing(world, rules)
            if await _pending(world.conn) != 1:
                raise BrokenPromise("A reader locked the parent table, but no detach is pending.")
    return True


def _interrupted(how: str) -> RunNight:
    """Interrupt DETACH … CONCURRENTLY while it waits for a reader."""

    async def run_night(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
        conns: list[Connection] = []
        world.database.watchers[NIGHTLY] = conns.append
        with lock_timeout(_LONG_MS):
            async with _reader(world):
                task = asyncio.create_task(jobs.run(world, rules))
                backend = await wait_for_detach(world.conn)
                if how == "killed":
                    conns[-1].terminate()
                    task.cancel()
                    await asyncio.wait((task,))
                    await _skipped(world, rules)  # the interrupted run's backend still waits, and holds the lock
                else:
                    await world.conn.execute(f"SELECT pg_{how}_backend($1)", backend)
            del world.database.watchers[NIGHTLY]
            if how == "killed":
                await jobs.after_kill(world)
                return True
            done = await task
        if done.status != ("completed" if how == "cancel" else "failed"):
            raise BrokenPromise(f"The detach was interrupted ({how}), and the run is {done.status}: {done.reason}")
        return True

    return run_night


KINDS = (
    FaultKind("lock held by another session", always, _lock_held),
    FaultKind("parent table locked by a reader", has_attached_day, _reader_blocks_detach),
    FaultKind("detach cancelled", has_attached_day, _interrupted("cancel")),
    FaultKind("backend of a detach terminated", has_attached_day, _interrupted("terminate")),
    FaultKind("killed during a detach, which PostgreSQL completes", has_attached_day, _interrupted("killed")),
)
