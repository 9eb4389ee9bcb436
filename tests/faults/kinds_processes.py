"""Processes that end, stand still, or are there twice; and the disk below them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import suppress

import asyncpg

from tests.faults.asking import ANSWER_S
from tests.faults.cluster import Cluster
from tests.faults.daemon import Daemon
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.tables import UNREACHABLE, held_up
from tests.faults.world import REAL, World
from tests.proxy import Trick

READY_S = 15.0  # what the next fault on the lane waits for; whether it is ready in the end is checked behind the run


async def _kill(world: World, _fault: Fault) -> None:
    await hit(world.daemons[0], signal.SIGKILL)


async def _kill_in_transaction(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    starts = daemon.starts
    async with held_up(world, "device_last_status", fault.lasts_s):
        if not daemon.send_signal(signal.SIGKILL):
            raise Unable("the daemon does not run")
    await daemon.comes_back(starts, READY_S)


async def _freeze(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    if not daemon.send_signal(signal.SIGSTOP):
        raise Unable("the daemon does not run")
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        daemon.send_signal(signal.SIGCONT)


async def _stop(world: World, _fault: Fault) -> None:
    await hit(world.daemons[0], signal.SIGTERM)


async def _stop_in_transaction(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    starts = daemon.starts
    async with held_up(world, "device_last_status", fault.lasts_s):
        if not daemon.send_signal(signal.SIGTERM):
            raise Unable("the daemon does not run")
        await asyncio.sleep(fault.lasts_s / 2)
    await daemon.comes_back(starts, READY_S)


async def hit(daemon: Daemon, number: signal.Signals) -> None:
    """Send it that signal, and wait until it is back and ready."""
    starts = daemon.starts
    if not daemon.send_signal(number):
        raise Unable("the daemon does not run")
    await daemon.comes_back(starts, READY_S)


async def _second(world: World, fault: Fault) -> None:
    """Both take heartbeats, also one that a device has sent to the other; and one stands still with what it holds,
    while devices send the same and newer ones to the other."""
    first, second = world.daemons
    second.want()
    try:
        await second.ready(READY_S)
        await asyncio.sleep(fault.lasts_s / 2)
        first.send_signal(signal.SIGSTOP)
        await asyncio.sleep(fault.lasts_s / 2 + 2 * ANSWER_S * (fault.dice % 0.5))
    finally:
        first.send_signal(signal.SIGCONT)
        await second.stop(signal.SIGKILL if fault.dice < 0.5 else signal.SIGTERM)


def own_cluster(world: World) -> Cluster:
    """The run's own PostgreSQL."""
    assert world.cluster is not None  # such kinds are drawn only where there is one
    return world.cluster


async def _kill_backend(world: World, _fault: Fault) -> None:
    """PostgreSQL takes it for a crash and starts anew, with every other backend."""
    if not (pid := await own_cluster(world).backend()):
        raise Unable("the writer has no backend")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    await world.daemons[0].ready(READY_S)


async def _kill_postmaster(world: World, _fault: Fault) -> None:
    own_cluster(world).kill()
    await world.daemons[0].ready(READY_S)


async def _kill_at_commit(world: World, fault: Fault) -> None:
    """Nothing of the transaction is on disk, and PostgreSQL gives its number to the next who wants one: to others."""
    cluster, proxy = own_cluster(world), world.proxies[0]
    starts = cluster.starts
    proxy.played.clear()
    proxy.trick = Trick.CUT_BEFORE
    try:
        async with asyncio.timeout(fault.lasts_s + READY_S):
            await proxy.played.wait()
            cluster.kill()
            proxy.take_away()
            await cluster.started_again(starts)
            async with world.connection() as conn:
                for _ in range(200):
                    await conn.execute("SELECT pg_current_xact_id()")
    except (TimeoutError, *UNREACHABLE) as error:
        raise Unable(f"nothing came along, or another fault came first: {error}") from error
    finally:
        proxy.trick = Trick.NONE
        proxy.give_back()
    await world.daemons[0].ready(READY_S)


async def _step_clock(world: World, fault: Fault) -> None:
    """So far that received_at is far off, and no heartbeat falls out of the accept window."""
    daemon = world.daemons[0]
    file = world.folder / "clock"
    daemon.command = ("-m", "tests.faults.clock", str(file))
    try:
        await hit(daemon, signal.SIGTERM)
        for hours in random.Random(fault.dice).sample((90.0, 3.0, -3.0, -14.0), 3):  # noqa: S311 - a simulation
            file.write_text(f"{hours}")
            await asyncio.sleep(fault.lasts_s / 3)
    finally:
        file.write_text("0")
        daemon.command = REAL
    await hit(daemon, signal.SIGTERM)


async def _restart(world: World, fault: Fault) -> None:
    cluster = own_cluster(world)
    cluster.stop()
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        cluster.may_start()
    await world.daemons[0].ready(READY_S)


async def _fill_disk(world: World, fault: Fault) -> None:
    """The tables cannot grow; with the next segment of the WAL due, PostgreSQL panics and cannot recover either."""
    cluster = own_cluster(world)
    try:
        await asyncio.to_thread(cluster.fill_disk)
        if fault.dice < 0.5:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                async with world.connection() as conn:
                    await conn.execute("SELECT pg_switch_wal()")
        await asyncio.sleep(fault.lasts_s)
    finally:
        cluster.free_disk()
    await world.daemons[0].ready(READY_S)


KINDS = (
    Kind("daemon killed", "processes", (0.8, 1.2), _kill, weight=2),
    Kind("daemon killed in mid-transaction", "processes", (0.3, 1.0), _kill_in_transaction),
    Kind("daemon frozen", "processes", (0.3, 5.0), _freeze),
    Kind("daemon stopped in order", "processes", (0.8, 1.2), _stop),
    Kind("daemon stopped in mid-transaction", "processes", (0.5, 2.0), _stop_in_transaction),
    Kind("two daemons at once", "processes", (0.5, 2.5), _second),
    Kind("backend killed", "processes", (0.5, 1.0), _kill_backend, own_cluster=True),
    Kind("postmaster killed", "processes", (1.0, 1.5), _kill_postmaster, own_cluster=True),
    Kind("postmaster killed at a COMMIT", "processes", (1.5, 2.5), _kill_at_commit, own_cluster=True),
    Kind("clock stepped", "processes", (1.0, 3.0), _step_clock, own_cluster=True),
    Kind("database restarted", "processes", (0.2, 4.0), _restart, own_cluster=True),
    Kind("disk full", "processes", (0.5, 2.5), _fill_disk, own_cluster=True, small_disk=True),
)
