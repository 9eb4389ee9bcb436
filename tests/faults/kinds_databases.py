"""Another database replaces the one that the daemon is connected to: a promoted standby, or a copy under the same
name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from nexhb.errors import EmbeddedPostgresError
from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.kinds_processes import READY_S, own_cluster
from tests.faults.managed_devices import State
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.processes import wait_for_exit
from tests.faults.standby import Standby
from tests.faults.world import World

NO_SESSIONS_S = 10.0  # timeout until no session is connected to the database
BEFORE_ACCEPT_S = 0.5  # the daemon refuses heartbeats for this long before the operator accepts an older copy
COMMAND_S = 20.0
_WAITING_WRITERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'nexhb writer' AND wait_event = 'SyncRep'"
_TERMINATE_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"


@asynccontextmanager
async def _disconnected(world: World) -> AsyncIterator[None]:
    """For the block, disconnect the daemons from the database."""
    for proxy in world.proxies:
        proxy.make_unreachable()
    try:
        yield
    finally:
        for proxy in world.proxies:
            proxy.make_reachable()


# ---- a copy under the same name ---------------------------------------------------------------------------------


async def _execute_without_sessions(conn: asyncpg.Connection, database: str, statement: str) -> None:
    """Execute a statement that requires that no session is connected to `database`. Raises NotPossible."""
    deadline = time.monotonic() + NO_SESSIONS_S
    while True:
        await conn.execute(_TERMINATE_SESSIONS, database)
        try:
            await conn.execute(statement)
        except asyncpg.ObjectInUseError as error:
            if time.monotonic() > deadline:
                raise NotPossible(f"{error}") from error
            await asyncio.sleep(0.02)
        else:
            return


async def _replace_by_copy(world: World, fault: Fault) -> None:
    """Copy the database, let devices send for a while, and give the copy the database's name: the heartbeats that were
    acknowledged in between are lost, but no other heartbeat may be lost."""
    name = world.dsn.partition("?")[0].rpartition("/")[2]
    older, newer = f"{name}_older_{time.monotonic_ns()}", f"{name}_newer_{time.monotonic_ns()}"
    try:
        conn = await asyncpg.connect(world.dsn, database="template1", timeout=10, command_timeout=30)
    except UNREACHABLE as error:
        raise NotPossible(f"{error}") from error
    try:
        async with _disconnected(world):
            await _execute_without_sessions(conn, name, f"CREATE DATABASE {older} TEMPLATE {name}")
            copied_s = time.monotonic()
        await _change_database(world, fault)
        async with _disconnected(world):
            await _execute_without_sessions(conn, name, f"ALTER DATABASE {name} RENAME TO {newer}")
            await conn.execute(f"ALTER DATABASE {older} RENAME TO {name}")
            world.allowed_losses.append((copied_s, time.monotonic()))
    except (*UNREACHABLE, TimeoutError) as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error
    finally:
        conn.terminate()
    _repeat_heartbeats(world)
    await _accept_older_copy(world)


async def _change_database(world: World, fault: Fault) -> None:
    """Rotate a token, and wait while heartbeats are stored; the copy has neither the token nor these heartbeats."""
    if managed := world.managed_devices.pick(State.GOOD, fault.dice):
        await world.managed_devices.rotate(managed)
    await asyncio.sleep(fault.duration_s)


def _repeat_heartbeats(world: World) -> None:
    """Let devices send the last acknowledged heartbeats again: the older copy lacks them, although a daemon may have
    them in its cache."""
    for kiosk in world.kiosks:
        kiosk.repeat()


async def _accept_older_copy(world: World) -> None:
    """Read which tokens the database has now, and let the operator accept that it lacks the other tokens."""
    await world.managed_devices.read_states_again()
    await world.daemons[0].ready(READY_S)
    await asyncio.sleep(BEFORE_ACCEPT_S)
    await accept(world)


async def accept(world: World) -> None:
    """Let the operator accept the older copy: a token that the copy lacks belongs to no device from now on."""
    with world.managed_devices.accepting():
        process = world.daemons[0].begin("database", "accept")
        try:
            async with asyncio.timeout(COMMAND_S):
                await wait_for_exit(process.pid)
        except TimeoutError:
            process.kill()
            await wait_for_exit(process.pid)
        process.wait()


# ---- a standby ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _standby(world: World) -> AsyncIterator[tuple[Standby, asyncpg.Connection]]:
    """Yield a standby and a connection to the primary; after the block, remove the standby unless it was promoted."""
    cluster = own_cluster(world)
    try:
        standby = await asyncio.to_thread(cluster.make_standby)
    except EmbeddedPostgresError as error:
        raise NotPossible(f"{error}") from error
    try:
        conn = await asyncpg.connect(cluster.dsn, timeout=5, command_timeout=20)
        try:
            yield standby, conn
        finally:
            conn.terminate()
    except (*UNREACHABLE, TimeoutError, EmbeddedPostgresError) as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error
    finally:
        if cluster.data_dir != standby.data_dir:
            await asyncio.to_thread(standby.crash)


async def _promote(world: World, standby: Standby) -> None:
    """End the primary, promote the standby, and direct the daemons' connections to it."""
    cluster = own_cluster(world)
    await cluster.crash()
    await cluster.replace_with(standby)
    world.dsn = cluster.dsn
    for proxy in world.proxies:
        proxy.redirect_to(cluster.dsn)


async def _promote_lagging(world: World, fault: Fault) -> None:
    async with _standby(world) as (standby, primary):
        async with _disconnected(world):
            await standby.catch_up(primary)
            await standby.stop_receiving()
            copied_s = time.monotonic()
        await _change_database(world, fault)
        async with _disconnected(world):
            world.allowed_losses.append((copied_s, time.monotonic()))
            await _promote(world, standby)
    _repeat_heartbeats(world)
    await _accept_older_copy(world)


@asynccontextmanager
async def _synchronous_replication(primary: asyncpg.Connection) -> AsyncIterator[None]:
    """For the block, make COMMITs wait for the standby; afterwards, let them commit without the standby again if the
    primary can still be reached."""
    await primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await primary.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        with suppress(*UNREACHABLE):
            await primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await primary.execute("SELECT pg_reload_conf()")


async def _interrupt_waits(primary: asyncpg.Connection, duration_s: float) -> None:
    """Cancel and terminate, in turn, the writers that wait for the standby within COMMIT, for `duration_s` seconds."""
    deadline, turn = time.monotonic() + duration_s, 0
    while time.monotonic() < deadline:
        for row in await primary.fetch(_WAITING_WRITERS):
            turn += 1
            await primary.execute(f"SELECT pg_{('terminate', 'cancel')[turn % 2]}_backend($1)", row["pid"])
        await asyncio.sleep(0.05)


async def _promote_synchronous(world: World, fault: Fault) -> None:
    """Stop the standby for a while, so that COMMITs wait for it, and cancel or terminate the waiting writers. Then
    crash the primary: the standby has everything that was acknowledged, including heartbeats that no device sends
    again."""
    async with _standby(world) as (standby, primary), _synchronous_replication(primary):
        await standby.catch_up(primary)
        await asyncio.sleep(fault.duration_s / 4)
        await asyncio.to_thread(standby.crash)
        await _interrupt_waits(primary, fault.duration_s / 2)
        if fault.dice < 0.3:
            await asyncio.to_thread(standby.start)
            await asyncio.sleep(fault.duration_s / 4)
        async with _disconnected(world):
            await own_cluster(world).crash()
            if fault.dice >= 0.3:  # the standby has received nothing since its stop, and now the primary is down
                await asyncio.to_thread(standby.start)
            await _promote(world, standby)
    await _accept_older_copy(world)


KINDS = (
    FaultKind("database replaced by an older copy", Lane.PROCESSES, (0.8, 2.0), _replace_by_copy, own_cluster=True),
    FaultKind("lagging standby promoted", Lane.PROCESSES, (0.8, 2.0), _promote_lagging, own_cluster=True),
    FaultKind(
        "synchronous standby killed and promoted", Lane.PROCESSES, (1.0, 3.0), _promote_synchronous, own_cluster=True
    ),
)
