"""Kill a nightly run between any two steps or at any statement, or cut its connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg

from nexhb import partitions
from nexhb.errors import NexhbError
from nexhb.jobs.plan import NightlyRules
from nexhb.postgres.connections import Connection
from tests.timelapse import jobs, operators
from tests.timelapse.database import NIGHTLY, wait_until_gone
from tests.timelapse.fault_kinds import FaultKind, always, has_day_to_archive, has_dropped_day, has_supplements
from tests.timelapse.jobs import TonightsPlan
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.world import World

DAY_POINTS = ("detached", "sealed", "object stored", "manifest stored", "verified", "recorded", "dropped")
LATE_POINTS = ("object stored", "manifest stored", "verified", "recorded")
_STATEMENTS = 80  # a nightly run rarely has more

RunNight = Callable[[World, NightlyRules, TonightsPlan], Awaitable[bool]]


def _at(point: str, kind: str) -> RunNight:
    async def run_night(world: World, rules: NightlyRules, tonight: TonightsPlan) -> bool:
        # `passes`: the number of days whose archiving passes this point before the run is killed there
        passes = world.rng.randrange(max(1, len(tonight.days_to_archive))) if kind == "day" else 0
        world.store.last_put = "/day-"  # for the checkpoints before the first put

        def when(at: str) -> bool:
            nonlocal passes
            is_here = at == point and f"/{kind}-" in world.store.last_put
            passes -= is_here
            return is_here and passes < 0

        return await jobs.run_killed(world, rules, when)

    return run_night


def _then_restored(point: str) -> RunNight:
    """Kill a run at `point`; before the next run, an operator restores the day that the run has detached."""

    async def run_night(world: World, rules: NightlyRules, tonight: TonightsPlan) -> bool:
        if not await _at(point, "day")(world, rules, tonight):
            return False
        name = await world.conn.fetchval(
            """SELECT range_start::date FROM hb_partitions p
               WHERE state <> 'dropped' AND to_regclass(partition_name) IS NOT NULL
                 AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(partition_name))
               ORDER BY range_start LIMIT 1"""
        )
        await operators.restore_day(world, name, world.rng.randint(1, 3))
        return True

    return run_night


async def _cut(world: World, application: str, at: int, work: Coroutine[Any, Any, object], *, killed: bool) -> bool:
    """Run `work` and cut its connection after statement number `at`. Return False if `work` did not reach that
    statement.

    With `killed`, cancel `work` there; otherwise `work` can still record the loss on another connection."""
    executed, is_cut = 0, False
    task: asyncio.Task[object]

    def watch(conn: Connection) -> None:
        def count(_record: object) -> None:
            nonlocal executed, is_cut
            executed += 1
            if executed == at and not conn.is_closed():
                is_cut = True
                conn.terminate()
                if killed:
                    task.cancel()

        conn.add_query_logger(count)

    world.database.watchers[application] = watch
    task = asyncio.create_task(work)
    try:
        await task
    except (asyncio.CancelledError, asyncpg.InterfaceError, asyncpg.PostgresError, NexhbError):
        if not is_cut:
            raise
    finally:
        del world.database.watchers[application]
    if is_cut:
        await wait_until_gone(world.conn, application)
    return is_cut


def _at_statement(*, killed: bool) -> RunNight:
    async def run_night(world: World, rules: NightlyRules, _tonight: TonightsPlan) -> bool:
        at = world.rng.randint(1, _STATEMENTS)
        is_cut = await _cut(world, NIGHTLY, at, jobs.run(world, rules), killed=killed)
        if is_cut:
            await jobs.after_kill(world)
        return is_cut

    return run_night


async def _in_a_restore(world: World, _rules: NightlyRules, tonight: TonightsPlan) -> bool:
    """Kill a restore, which must restore the whole day or nothing."""
    day = world.rng.choice(tonight.dropped_days)
    restore = operators.restore_day(world, day, 2)
    if not await _cut(world, operators.RESTORE, world.rng.randint(1, 12), restore, killed=True):
        return False
    if await partitions.table_exists(world.conn, partitions.table_name(day)):
        raise BrokenPromise(f"The restore of {day} was killed, but has left a table.")
    await operators.restore_day(world, day, 2)
    return True


KINDS = (
    *(FaultKind(f'killed at "{point}"', has_day_to_archive, _at(point, "day")) for point in DAY_POINTS),
    *(FaultKind(f'killed at "{point}" of a supplement', has_supplements, _at(point, "late")) for point in LATE_POINTS),
    *(
        FaultKind(f'killed at "{point}", and the day restored', has_day_to_archive, _then_restored(point))
        for point in ("detached", "verified", "recorded")
    ),
    FaultKind("killed at a random statement", always, _at_statement(killed=True)),
    FaultKind("connection lost at a random statement", always, _at_statement(killed=False)),
    FaultKind("killed during a restore", has_dropped_day, _in_a_restore),
)
