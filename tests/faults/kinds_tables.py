"""What other sessions do in the database: they lock tables, terminate the writer's backend, and run jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from tests.faults.blocked_writer import writer_blocked
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.processes import wait_for_exit
from tests.faults.world import World

Act = Callable[[World, Fault], Awaitable[None]]


def _locked(table: Callable[[], str]) -> Act:
    async def act(world: World, fault: Fault) -> None:
        async with writer_blocked(world, table(), fault.duration_s):
            await asyncio.sleep(fault.duration_s)

    return act


def _day() -> str:
    """Return the name of today's partition (UTC)."""
    return f"device_heartbeats_{datetime.now(UTC):%Y%m%d}"


async def _terminate(world: World, fault: Fault) -> None:
    """Terminate the writer's backend while it waits for a lock within its transaction."""
    async with writer_blocked(world, "device_last_status", fault.duration_s) as backends, world.connection() as conn:
        if not backends:
            raise NotPossible("no writer is in a transaction")
        for pid in backends:
            await conn.execute("SELECT pg_terminate_backend($1)", pid)


def _request(path: str) -> Act:
    async def act(world: World, _fault: Fault) -> None:
        if not await world.daemons[0].post(path):
            raise NotPossible("the daemon did not respond")

    return act


DAYS_ARCHIVED = "days archived"
FAULTY_STORE = "faulty archive store"
NIGHTLY_RUN_S = 20.0
SHORT_RETENTION = {"NEXHB_PARTITIONS__RETENTION_DAYS": "1", "NEXHB_INGEST__ACCEPT_PAST": "1d"}


async def _archive_days(world: World, _fault: Fault) -> None:
    """Shorten the retention, as an operator may: days to which heartbeats are still written are archived and
    dropped."""
    await archive_days(world, NIGHTLY_RUN_S)


async def _faulty_store(world: World, fault: Fault) -> None:
    """Archive days while the store is faulty: no day may be dropped unless the store contains the day unchanged."""
    with world.s3.faulty():
        await archive_days(world, NIGHTLY_RUN_S, **world.s3.environment)
        if fault.dice < 0.3:  # a second run finds objects of the first run in the store
            await archive_days(world, NIGHTLY_RUN_S, **world.s3.environment)
    if fault.dice > 0.7:
        await archive_days(world, NIGHTLY_RUN_S, **world.s3.environment)


async def archive_days(world: World, timeout_s: float, **settings: str) -> int | None:
    """Run `nexhb nightly` with a short retention. Return its exit code, or None if it was killed after `timeout_s`
    seconds."""
    process = world.daemons[0].begin("nightly", **SHORT_RETENTION | settings)
    try:
        async with asyncio.timeout(timeout_s):
            await wait_for_exit(process.pid)
    except TimeoutError:
        process.kill()
        await wait_for_exit(process.pid)
        process.wait()
        return None
    return process.wait()


KINDS = (
    FaultKind(DAYS_ARCHIVED, Lane.TABLES, (1.0, 2.0), _archive_days, own_cluster=True),
    FaultKind(FAULTY_STORE, Lane.TABLES, (2.0, 3.0), _faulty_store, own_cluster=True),
    FaultKind("device_last_status locked", Lane.TABLES, (0.3, 5.0), _locked(lambda: "device_last_status")),
    FaultKind("today's partition locked", Lane.TABLES, (0.3, 5.0), _locked(_day)),
    FaultKind("backend terminated during a transaction", Lane.TABLES, (0.5, 1.0), _terminate, weight=3),
    FaultKind("nightly run", Lane.TABLES, (0.5, 1.0), _request("/ops/nightly")),
    FaultKind("reconciliation", Lane.TABLES, (0.2, 0.5), _request("/ops/reconcile")),
)
