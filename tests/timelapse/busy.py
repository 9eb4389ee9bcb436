"""Somebody in the way: the lock held elsewhere, a reader that holds the parent, a detach that is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nexhb.db import Connection
from nexhb.jobs.plan import Rules
from nexhb.locks import Lock
from tests.timelapse import jobs
from tests.timelapse.cards import Card, always, whole
from tests.timelapse.database import NIGHTLY, detaching, lock_timeout
from tests.timelapse.jobs import Sight
from tests.timelapse.kills import Play
from tests.timelapse.ledger import Broken
from tests.timelapse.world import World

_SHORT_MS, _LONG_MS = 60, 20_000


async def _lock_held(world: World, rules: Rules, _sight: Sight) -> bool:
    other = await world.database.connect(application="another daemon")
    try:
        await other.fetchval("SELECT pg_advisory_lock($1)", int(Lock.NIGHTLY))
        await _skipped(world, rules)
    finally:
        await other.close(timeout=5)
    return True


async def _skipped(world: World, rules: Rules) -> None:
    done = await jobs.run(world, rules)
    if (done.status, done.reason) != ("skipped", "lock_held"):
        raise Broken(f"The lock was held, and the run {done.status}: {done.reason}")


@asynccontextmanager
async def _reader(world: World) -> AsyncIterator[None]:
    """A report that reads the whole history, and then goes to lunch."""
    conn = await world.database.connect(application="a long report")
    try:
        await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await conn.fetchval("SELECT count(*) FROM device_heartbeats")
        yield
    finally:
        await conn.close(timeout=5)


async def _pending(conn: Connection) -> int:
    return int(await conn.fetchval("SELECT count(*) FROM pg_inherits WHERE inhdetachpending"))


async def _read_all_night(world: World, rules: Rules, _sight: Sight) -> bool:
    with lock_timeout(_SHORT_MS):
        async with _reader(world):
            await jobs.run_badly(world, rules)
            if await _pending(world.conn) != 1:
                raise Broken("A reader held the parent, and no detach is pending.")
    return True


def _interrupted(how: str) -> Play:
    """In the middle of DETACH … CONCURRENTLY, which waits for a reader."""

    async def play(world: World, rules: Rules, _sight: Sight) -> bool:
        conns: list[Connection] = []
        world.database.watchers[NIGHTLY] = conns.append
        with lock_timeout(_LONG_MS):
            async with _reader(world):
                task = asyncio.create_task(jobs.run(world, rules))
                backend = await detaching(world.conn)
                if how == "killed":
                    conns[-1].terminate()
                    task.cancel()
                    await asyncio.wait((task,))
                    await _skipped(world, rules)  # its backend still waits, and holds the lock
                else:
                    await world.conn.execute(f"SELECT pg_{how}_backend($1)", backend)
            del world.database.watchers[NIGHTLY]
            if how == "killed":
                await jobs.after_kill(world)
                return True
            done = await task
        if done.status != ("completed" if how == "cancel" else "failed"):
            raise Broken(f"Its detach was interrupted by {how}, and it {done.status}: {done.reason}")
        return True

    return play


CARDS = (
    Card("lock held elsewhere", always, _lock_held),
    Card("a reader holds the parent", whole, _read_all_night),
    Card("detach cancelled", whole, _interrupted("cancel")),
    Card("backend of a detach terminated", whole, _interrupted("terminate")),
    Card("killed in a detach, which goes on by itself", whole, _interrupted("killed")),
)
