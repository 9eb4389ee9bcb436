"""Faults of processes: the daemon and PostgreSQL are killed, stopped or suspended, a second daemon runs, the daemon's
clock is stepped, the disk is full."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import suppress

import asyncpg

from tests.faults.blocked_writer import UNREACHABLE, writer_blocked
from tests.faults.cluster import Cluster
from tests.faults.daemon import Daemon
from tests.faults.device_client import TIMEOUT_S
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import REAL, World
from tests.proxy import CommitFault

# A fault that ends the daemon waits at most this long until the daemon is ready again. If the daemon is still not
# ready, the run continues; the check at the end requires that it is.
READY_S = 15.0


async def _kill(world: World, _fault: Fault) -> None:
    await end_and_wait(world.daemons[0], signal.SIGKILL)


async def _kill_in_transaction(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    starts = daemon.starts
    async with writer_blocked(world, "device_last_status", fault.duration_s):
        if not daemon.send_signal(signal.SIGKILL):
            raise NotPossible("the daemon is not running")
    await daemon.wait_for_restart(starts, READY_S)


async def _suspend(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    if not daemon.send_signal(signal.SIGSTOP):
        raise NotPossible("the daemon is not running")
    try:
        await asyncio.sleep(fault.duration_s)
    finally:
        daemon.send_signal(signal.SIGCONT)


async def _stop(world: World, _fault: Fault) -> None:
    await end_and_wait(world.daemons[0], signal.SIGTERM)


async def _stop_in_transaction(world: World, fault: Fault) -> None:
    daemon = world.daemons[0]
    starts = daemon.starts
    async with writer_blocked(world, "device_last_status", fault.duration_s):
        if not daemon.send_signal(signal.SIGTERM):
            raise NotPossible("the daemon is not running")
        await asyncio.sleep(fault.duration_s / 2)
    await daemon.wait_for_restart(starts, READY_S)


async def end_and_wait(daemon: Daemon, number: signal.Signals) -> None:
    """Send the daemon a signal that ends it, and wait until it is restarted and ready. Raises NotPossible."""
    starts = daemon.starts
    if not daemon.send_signal(number):
        raise NotPossible("the daemon is not running")
    await daemon.wait_for_restart(starts, READY_S)


async def _run_second(world: World, fault: Fault) -> None:
    """Run two daemons at once. Both receive heartbeats, including those that a device has already sent to the other
    one. Then the first daemon is suspended with the heartbeats that it holds, while devices send the same and newer
    heartbeats to the second daemon."""
    first, second = world.daemons
    second.keep_running()
    try:
        await second.ready(READY_S)
        await asyncio.sleep(fault.duration_s / 2)
        first.send_signal(signal.SIGSTOP)
        await asyncio.sleep(fault.duration_s / 2 + 2 * TIMEOUT_S * (fault.dice % 0.5))
    finally:
        first.send_signal(signal.SIGCONT)
        await second.stop(signal.SIGKILL if fault.dice < 0.5 else signal.SIGTERM)


def own_cluster(world: World) -> Cluster:
    """Return the run's own PostgreSQL."""
    assert world.cluster is not None  # faults that need the run's own PostgreSQL are drawn only if the run has one
    return world.cluster


async def _kill_backend(world: World, _fault: Fault) -> None:
    """Kill the writer's backend: PostgreSQL treats that as a crash, terminates every other backend and recovers."""
    if not (pid := await own_cluster(world).backend()):
        raise NotPossible("the writer has no backend")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    await world.daemons[0].ready(READY_S)


async def _kill_postmaster(world: World, _fault: Fault) -> None:
    own_cluster(world).kill()
    await world.daemons[0].ready(READY_S)


async def _kill_at_commit(world: World, fault: Fault) -> None:
    """Kill the postmaster before a COMMIT reaches PostgreSQL: nothing of the transaction is on disk, so PostgreSQL uses
    its transaction ID again, here for a transaction of this function."""
    cluster, proxy = own_cluster(world), world.proxies[0]
    starts = cluster.starts
    proxy.fault_applied.clear()
    proxy.commit_fault = CommitFault.CUT_BEFORE
    try:
        async with asyncio.timeout(fault.duration_s + READY_S):
            await proxy.fault_applied.wait()
            cluster.kill()
            proxy.make_unreachable()
            await cluster.wait_for_restart(starts)
            async with world.connection() as conn:
                for _ in range(200):
                    await conn.execute("SELECT pg_current_xact_id()")
    except (TimeoutError, *UNREACHABLE) as error:
        raise NotPossible(f"no COMMIT was sent, or another fault came first: {error}") from error
    finally:
        proxy.commit_fault = CommitFault.NONE
        proxy.make_reachable()
    await world.daemons[0].ready(READY_S)


async def _step_clock(world: World, fault: Fault) -> None:
    """Step the daemon's clock by hours, but not so far that a heartbeat leaves the accept window."""
    daemon = world.daemons[0]
    file = world.folder / "clock"
    daemon.entry = ("tests.faults.clock", str(file))
    try:
        await end_and_wait(daemon, signal.SIGTERM)
        for hours in random.Random(fault.dice).sample((90.0, 3.0, -3.0, -14.0), 3):  # noqa: S311 - a simulation
            file.write_text(f"{hours}")
            await asyncio.sleep(fault.duration_s / 3)
    finally:
        file.write_text("0")
        daemon.entry = REAL
    await end_and_wait(daemon, signal.SIGTERM)


async def _restart(world: World, fault: Fault) -> None:
    cluster = own_cluster(world)
    cluster.stop()
    try:
        await asyncio.sleep(fault.duration_s)
    finally:
        cluster.may_start()
    await world.daemons[0].ready(READY_S)


async def _fill_disk(world: World, fault: Fault) -> None:
    """Fill the disk: tables cannot grow, and if the next WAL segment is due, PostgreSQL panics and cannot recover
    either."""
    cluster = own_cluster(world)
    try:
        await asyncio.to_thread(cluster.fill_disk)
        if fault.dice < 0.5:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                async with world.connection() as conn:
                    await conn.execute("SELECT pg_switch_wal()")
        await asyncio.sleep(fault.duration_s)
    finally:
        cluster.free_disk()
    await world.daemons[0].ready(READY_S)


KINDS = (
    FaultKind("daemon killed", Lane.PROCESSES, (0.8, 1.2), _kill, weight=2),
    FaultKind("daemon killed during a transaction", Lane.PROCESSES, (0.3, 1.0), _kill_in_transaction),
    FaultKind("daemon suspended", Lane.PROCESSES, (0.3, 5.0), _suspend),
    FaultKind("daemon stopped", Lane.PROCESSES, (0.8, 1.2), _stop),
    FaultKind("daemon stopped during a transaction", Lane.PROCESSES, (0.5, 2.0), _stop_in_transaction),
    FaultKind("two daemons running", Lane.PROCESSES, (0.5, 2.5), _run_second),
    FaultKind("backend killed", Lane.PROCESSES, (0.5, 1.0), _kill_backend, own_cluster=True),
    FaultKind("postmaster killed", Lane.PROCESSES, (1.0, 1.5), _kill_postmaster, own_cluster=True),
    FaultKind("postmaster killed at COMMIT", Lane.PROCESSES, (1.5, 2.5), _kill_at_commit, own_cluster=True),
    FaultKind("daemon's clock stepped", Lane.PROCESSES, (1.0, 3.0), _step_clock, own_cluster=True),
    FaultKind("database restarted", Lane.PROCESSES, (0.2, 4.0), _restart, own_cluster=True),
    FaultKind("disk full", Lane.PROCESSES, (0.5, 2.5), _fill_disk, own_cluster=True, small_disk=True),
)
