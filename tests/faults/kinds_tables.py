"""What others do in the database meanwhile: locks, an operator's pg_terminate_backend, jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.processes import ended
from tests.faults.tables import held_up
from tests.faults.world import World

Act = Callable[[World, Fault], Awaitable[None]]


def _locked(table: Callable[[], str]) -> Act:
    async def act(world: World, fault: Fault) -> None:
        async with held_up(world, table(), fault.lasts_s):
            await asyncio.sleep(fault.lasts_s)

    return act


def _day() -> str:
    """The day that most of the devices' clocks are in now."""
    return f"device_heartbeats_{datetime.now(UTC):%Y%m%d}"


async def _terminate(world: World, fault: Fault) -> None:
    """The writer's backend, while it waits within its transaction."""
    async with held_up(world, "device_last_status", fault.lasts_s) as backends, world.connection() as conn:
        if not backends:
            raise Unable("no writer in a transaction")
        for pid in backends:
            await conn.execute("SELECT pg_terminate_backend($1)", pid)


def _called(path: str) -> Act:
    async def act(world: World, _fault: Fault) -> None:
        if not await world.daemons[0].post(path):
            raise Unable("the daemon did not answer")

    return act


SENT_AWAY = "days sent away"
HOSTILE = "hostile store"
SENDING_S = 20.0
SHORT = {"NEXHB_PARTITIONS__RETENTION_DAYS": "1", "NEXHB_INGEST__ACCEPT_PAST": "1d"}


async def _send_away(world: World, _fault: Fault) -> None:
    """An operator with a shorter retention in mind: days that still fill are detached, archived and dropped."""
    await send_days_away(world, SENDING_S)


async def _hostile_store(world: World, fault: Fault) -> None:
    """Such a run, and the store answers anything but what it was asked: no day may go that is not there as it was."""
    with world.bucket.hostile():
        await send_days_away(world, SENDING_S, **world.bucket.environment)
        if fault.dice < 0.3:  # what it did to the days that came before, and an honest store
            await send_days_away(world, SENDING_S, **world.bucket.environment)
    if fault.dice > 0.7:
        await send_days_away(world, SENDING_S, **world.bucket.environment)


async def send_days_away(world: World, bound_s: float, **settings: str) -> int | None:
    """A nightly run by such a command; its exit code, None where it had to be killed."""
    process = world.daemons[0].run("nightly", **SHORT | settings)
    try:
        async with asyncio.timeout(bound_s):
            await ended(process.pid)
    except TimeoutError:
        process.kill()
        await ended(process.pid)
        process.wait()
        return None
    return process.wait()


KINDS = (
    Kind(SENT_AWAY, "tables", (1.0, 2.0), _send_away, own_cluster=True),
    Kind(HOSTILE, "tables", (2.0, 3.0), _hostile_store, own_cluster=True),
    Kind("last status locked", "tables", (0.3, 5.0), _locked(lambda: "device_last_status")),
    Kind("the day's partition locked", "tables", (0.3, 5.0), _locked(_day)),
    Kind("backend terminated in mid-transaction", "tables", (0.5, 1.0), _terminate, weight=3),
    Kind("nightly run", "tables", (0.5, 1.0), _called("/ops/nightly")),
    Kind("reconciliation", "tables", (0.2, 0.5), _called("/ops/reconcile")),
)
