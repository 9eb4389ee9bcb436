"""What operators do: bring a day back, let it go again, take one out too early."""

from __future__ import annotations

from datetime import date, timedelta

from nexhb import locks, partitions
from nexhb.archive import catalog, restore
from nexhb.locks import Lock
from tests.timelapse.ledger import Broken, key_of, row_of_record
from tests.timelapse.world import World

RESTORE = "nexhb archive"  # its connection's name


async def bring_back(world: World, day: date, nights: int) -> None:
    """As `nexhb archive restore` does; released some nights later."""
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
    if await partitions.is_sealed(world.conn, partitions.name_of(day)):
        raise Broken(f"{day} came back, and takes no rows.")
    query = "SELECT * FROM heartbeat_history WHERE ts >= $1 AND ts < $1 + interval '1 day'"
    rows = [row_of_record(record) for record in await world.conn.fetch(query, partitions.midnight(day))]
    if strange := [row for row in rows if row not in world.ledger.rows.get(key_of(row), [])]:
        raise Broken(f"{day} came back with rows that nobody sent, {strange[0]} among them.")


async def release(world: World, *, everything: bool = False) -> None:
    """As `nexhb archive restore --release` does, for the days whose time has come."""
    for day, until in list(world.restored.items()):
        if everything or until <= world.now:
            await catalog.release(world.conn, day)
            del world.restored[day]


async def take_out(world: World, day: date) -> None:
    """A day leaves although it is young."""
    conn = await world.database.connect(application="timelapse detach", lock_timeout="2000")
    try:
        await partitions.detach(conn, partitions.name_of(day))
    finally:
        await conn.close(timeout=5)
