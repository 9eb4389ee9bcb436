"""Another database in the place of the one that the daemon knew: a standby that is promoted, a copy under its name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from nexhb.errors import EmbeddedPostgresError
from tests.faults.guests import State
from tests.faults.kinds_processes import READY_S, own_cluster
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.processes import ended
from tests.faults.standby import Standby
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

ALONE_S = 10.0  # until nobody is connected any more
HELD_S = 0.5  # before the operator goes on with an older copy
COMMAND_S = 20.0
_WAITS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb writer' AND wait_event = 'SyncRep'"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"


@asynccontextmanager
async def _unreached(world: World) -> AsyncIterator[None]:
    """For the block the daemons' ways to the database are cut."""
    for proxy in world.proxies:
        proxy.take_away()
    try:
        yield
    finally:
        for proxy in world.proxies:
            proxy.give_back()


# ---- a copy under its name --------------------------------------------------------------------------------------


async def _alone(conn: asyncpg.Connection, database: str, do: str) -> None:
    """A statement that wants nobody in that database. Raises Unable."""
    until = time.monotonic() + ALONE_S
    while True:
        await conn.execute(_END, database)
        try:
            await conn.execute(do)
        except asyncpg.ObjectInUseError as error:
            if time.monotonic() > until:
                raise Unable(f"{error}") from error
            await asyncio.sleep(0.02)
        else:
            return


async def _swap(world: World, fault: Fault) -> None:
    """A copy is made, devices go on for a while, and the copy takes the database's name: what they heard in between is
    gone, and nothing else may be."""
    name = world.dsn.partition("?")[0].rpartition("/")[2]
    older, newer = f"{name}_older_{time.monotonic_ns()}", f"{name}_newer_{time.monotonic_ns()}"
    try:
        conn = await asyncpg.connect(world.dsn, database="template1", timeout=10, command_timeout=30)
    except UNREACHABLE as error:
        raise Unable(f"{error}") from error
    try:
        async with _unreached(world):
            await _alone(conn, name, f"CREATE DATABASE {older} TEMPLATE {name}")
            copied_s = time.monotonic()
        await _meanwhile(world, fault)
        async with _unreached(world):
            await _alone(conn, name, f"ALTER DATABASE {name} RENAME TO {newer}")
            await conn.execute(f"ALTER DATABASE {older} RENAME TO {name}")
            world.forgiven.append((copied_s, time.monotonic()))
    except (*UNREACHABLE, TimeoutError) as error:
        raise Unable(f"{type(error).__name__}: {error}") from error
    finally:
        conn.terminate()
    _repeat(world)
    await _goes_on(world)


async def _meanwhile(world: World, fault: Fault) -> None:
    """What the copy will not have: heartbeats, and a token."""
    if guest := world.guests.pick(State.GOOD, fault.dice):
        await world.guests.rotate(guest)
    await asyncio.sleep(fault.lasts_s)


def _repeat(world: World) -> None:
    """Devices send again what they heard was in: the older copy has it not, whoever may remember it."""
    for kiosk in world.kiosks:
        kiosk.repeat()


async def _goes_on(world: World) -> None:
    """The operator finds out who is known, and accepts what is gone."""
    await world.guests.found_anew()
    await world.daemons[0].ready(READY_S)
    await asyncio.sleep(HELD_S)
    await accept(world)


async def accept(world: World) -> None:
    """The operator goes on with the older copy: a token that it does not know is nobody's from now on."""
    with world.guests.accepting():
        process = world.daemons[0].run("database", "accept")
        try:
            async with asyncio.timeout(COMMAND_S):
                await ended(process.pid)
        except TimeoutError:
            process.kill()
            await ended(process.pid)
        process.wait()


# ---- a standby ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _standby(world: World) -> AsyncIterator[tuple[Standby, asyncpg.Connection]]:
    """A standby for the block, and a connection to the primary; what was not promoted is gone behind it."""
    cluster = own_cluster(world)
    try:
        standby = await asyncio.to_thread(cluster.make_standby)
    except EmbeddedPostgresError as error:
        raise Unable(f"{error}") from error
    try:
        conn = await asyncpg.connect(cluster.dsn, timeout=5, command_timeout=20)
        try:
            yield standby, conn
        finally:
            conn.terminate()
    except (*UNREACHABLE, TimeoutError, EmbeddedPostgresError) as error:
        raise Unable(f"{type(error).__name__}: {error}") from error
    finally:
        if cluster.data_dir != standby.data_dir:
            await asyncio.to_thread(standby.end)


async def _promote(world: World, standby: Standby) -> None:
    """The primary is lost, and the daemons' ways lead to the standby."""
    cluster = own_cluster(world)
    await cluster.lose()
    await cluster.give_way(standby)
    world.dsn = cluster.dsn
    for proxy in world.proxies:
        proxy.lead_to(cluster.dsn)


async def _promote_lagging(world: World, fault: Fault) -> None:
    async with _standby(world) as (standby, primary):
        async with _unreached(world):
            await standby.caught_up(primary)
            await standby.receive_nothing()
            copied_s = time.monotonic()
        await _meanwhile(world, fault)
        async with _unreached(world):
            world.forgiven.append((copied_s, time.monotonic()))
            await _promote(world, standby)
    _repeat(world)
    await _goes_on(world)


@asynccontextmanager
async def _synchronous(primary: asyncpg.Connection) -> AsyncIterator[None]:
    """For the block COMMITs wait for the standby; behind it no longer, should the primary be there still."""
    await primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await primary.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        with suppress(*UNREACHABLE):
            await primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await primary.execute("SELECT pg_reload_conf()")


async def _end_waits(primary: asyncpg.Connection, lasts_s: float) -> None:
    """Writers that wait for the standby within COMMIT are cancelled and ended in turn."""
    until, turn = time.monotonic() + lasts_s, 0
    while time.monotonic() < until:
        for row in await primary.fetch(_WAITS):
            turn += 1
            await primary.execute(f"SELECT pg_{('terminate', 'cancel')[turn % 2]}_backend($1)", row["pid"])
        await asyncio.sleep(0.05)


async def _promote_synchronous(world: World, fault: Fault) -> None:
    """The standby dies for a while, and COMMITs wait for it; whoever waits is cancelled, or ended. Then the primary is
    lost: the standby has all that was acknowledged, also what nobody sends again."""
    async with _standby(world) as (standby, primary), _synchronous(primary):
        await standby.caught_up(primary)
        await asyncio.sleep(fault.lasts_s / 4)
        await asyncio.to_thread(standby.end)
        await _end_waits(primary, fault.lasts_s / 2)
        if fault.dice < 0.3:
            await asyncio.to_thread(standby.start)
            await asyncio.sleep(fault.lasts_s / 4)
        async with _unreached(world):
            await own_cluster(world).lose()
            if fault.dice >= 0.3:  # it has heard nothing since it died, and nobody can tell it any more
                await asyncio.to_thread(standby.start)
            await _promote(world, standby)
    await _goes_on(world)


KINDS = (
    Kind("swapped for an older copy", "processes", (0.8, 2.0), _swap, own_cluster=True),
    Kind("lagging standby promoted", "processes", (0.8, 2.0), _promote_lagging, own_cluster=True),
    Kind("synchronous standby dies and is promoted", "processes", (1.0, 3.0), _promote_synchronous, own_cluster=True),
)
