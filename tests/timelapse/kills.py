"""A nightly run that is killed, between any two steps and at any statement; and one that loses its connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg

from nexhb import partitions
from nexhb.db import Connection
from nexhb.errors import NexhbError
from nexhb.jobs.plan import Rules
from tests.timelapse import jobs, operators
from tests.timelapse.cards import Card, always, archives, some_dropped, supplements
from tests.timelapse.database import NIGHTLY, gone
from tests.timelapse.jobs import Sight
from tests.timelapse.ledger import Broken
from tests.timelapse.world import World

DAY_POINTS = ("detached", "sealed", "object stored", "manifest stored", "verified", "recorded", "dropped")
LATE_POINTS = ("object stored", "manifest stored", "verified", "recorded")
_STATEMENTS = 80  # more than this a night hardly has

Play = Callable[[World, Rules, Sight], Awaitable[bool]]


def _at(point: str, kind: str) -> Play:
    async def play(world: World, rules: Rules, sight: Sight) -> bool:
        passes = world.rng.randrange(max(1, len(sight.leaving))) if kind == "day" else 0  # of older days
        world.store.last_put = "/day-"  # of the points before a put

        def when(at: str) -> bool:
            nonlocal passes
            here = at == point and f"/{kind}-" in world.store.last_put
            passes -= here
            return here and passes < 0

        return await jobs.run_killed(world, rules, when)

    return play


def _then_restored(point: str) -> Play:
    """The day's table is still there, and somebody wants the day back before the next run."""

    async def play(world: World, rules: Rules, sight: Sight) -> bool:
        if not await _at(point, "day")(world, rules, sight):
            return False
        name = await world.conn.fetchval(
            """SELECT range_start::date FROM hb_partitions p
               WHERE state <> 'dropped' AND to_regclass(partition_name) IS NOT NULL
                 AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(partition_name))
               ORDER BY range_start LIMIT 1"""
        )
        await operators.bring_back(world, name, world.rng.randint(1, 3))
        return True

    return play


async def _cut(world: World, application: str, at: int, work: Coroutine[Any, Any, object], *, killed: bool) -> bool:
    """Do `work`, and cut that connection of it behind its statement number `at`; False where it did not come so far.

    Killed, or only cut off: then it can still say so, by another connection."""
    seen, hit = 0, False
    task: asyncio.Task[object]

    def watch(conn: Connection) -> None:
        def count(_record: object) -> None:
            nonlocal seen, hit
            seen += 1
            if seen == at and not conn.is_closed():
                hit = True
                conn.terminate()
                if killed:
                    task.cancel()

        conn.add_query_logger(count)

    world.database.watchers[application] = watch
    task = asyncio.create_task(work)
    try:
        await task
    except (asyncio.CancelledError, asyncpg.InterfaceError, asyncpg.PostgresError, NexhbError):
        if not hit:
            raise
    finally:
        del world.database.watchers[application]
    if hit:
        await gone(world.conn, application)
    return hit


def _at_statement(*, killed: bool) -> Play:
    async def play(world: World, rules: Rules, _sight: Sight) -> bool:
        at = world.rng.randint(1, _STATEMENTS)
        hit = await _cut(world, NIGHTLY, at, jobs.run(world, rules), killed=killed)
        if hit:
            await jobs.after_kill(world)
        return hit

    return play


async def _in_a_restore(world: World, _rules: Rules, sight: Sight) -> bool:
    """It is all of a day or nothing."""
    day = world.rng.choice(sight.dropped)
    restore = operators.bring_back(world, day, 2)
    if not await _cut(world, operators.RESTORE, world.rng.randint(1, 12), restore, killed=True):
        return False
    if await partitions.present(world.conn, partitions.name_of(day)):
        raise Broken(f"The restore of {day} was killed, and there is something of it.")
    await operators.bring_back(world, day, 2)
    return True


CARDS = (
    *(Card(f'killed at "{point}"', archives, _at(point, "day")) for point in DAY_POINTS),
    *(Card(f'killed at "{point}" of a supplement', supplements, _at(point, "late")) for point in LATE_POINTS),
    *(
        Card(f'killed at "{point}", and the day restored', archives, _then_restored(point))
        for point in ("detached", "verified", "recorded")
    ),
    Card("killed at some statement", always, _at_statement(killed=True)),
    Card("connection lost at some statement", always, _at_statement(killed=False)),
    Card("killed in a restore", some_dropped, _in_a_restore),
)
