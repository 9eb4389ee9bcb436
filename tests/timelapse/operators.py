"""Actions of operators: restore a day, release a restored day, detach a day too early."""

from __future__ import annotations

from datetime import date, timedelta

from nexhb import partitions, retirement
from nexhb.archive import catalog, restore
from nexhb.postgres import locks
from nexhb.postgres.locks import Lock
from tests.timelapse.ledger import BrokenPromise, key_of, row_of_record
from tests.timelapse.world import World

RESTORE = "nexhb archive"  # the application name of a restore's connection


async def restore_day(world: World, day: date, nights: int) -> None:
    """Restore a day as `nexhb archive restore` does. The function `release` releases it `nights` nights later."""
    conn = await world.database.connect(application=RESTORE, lock_timeout="2000")
    try:
        async with locks.held(conn, Lock.NIGHTLY, wait=False):
            detached = await catalog.find_detached(conn, day)
            archives = [detached] if detached else await catalog.find(conn, day)
            await restore.restore_day(conn, world.store, archives, world.now)
    finally:
        await conn.close(timeout=5)
    world.restored[day] = world.now + timedelta(days=nights)
    await _compare(world, day)


async def _compare(world: World, day: date) -> None:
    if await retirement.is_sealed(world.conn, partitions.table_name(day)):
        raise BrokenPromise(f"{day} was restored, but accepts no rows.")
    query = "SELECT * FROM heartbeat_history WHERE ts >= $1 AND ts < $1 + interval '1 day'"
    rows = [row_of_record(record) for record in await world.conn.fetch(query, partitions.midnight(day))]
    if unsent := [row for row in rows if row not in world.ledger.rows.get(key_of(row), [])]:
        raise BrokenPromise(f"{day} was restored with rows that nobody sent, such as {unsent[0]}.")


async def release(world: World, *, everything: bool = False) -> None:
    """Release the days that are due, as `nexhb archive restore --release` does."""
    for day, until in list(world.restored.items()):
        if everything or until <= world.now:
            await catalog.release(world.conn, day)
            del world.restored[day]


async def detach_day(world: World, day: date) -> None:
    """Detach a day that is within the retention."""
    conn = await world.database.connect(application="timelapse detach", lock_timeout="2000")
    try:
        await retirement.detach(conn, partitions.table_name(day))
    finally:
        await conn.close(timeout=5)
