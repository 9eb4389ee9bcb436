"""The connection on which the daemon listens for notifications stalls, while everything else works: a change of which
the daemon is not notified must take effect nevertheless."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.faults.blocked_writer import UNREACHABLE
from tests.faults.managed_devices import LIMIT_S, MARGIN_S, State
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World

LISTENER = "nexhb devices"
DURATION_S = (
    LIMIT_S + MARGIN_S + 1.0,
    LIMIT_S + MARGIN_S + 2.0,
)  # longer than LIMIT_S, so that devices also send after that limit
MAX_SUSPENDED_S = 15.0
_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"


async def _stall(world: World, fault: Fault) -> None:
    """Stall the listener's connections; a connection that the listener opens later works."""
    with world.proxies[1 if world.daemons[1].is_running else 0].stalled_for(LISTENER) as stalled:
        if not stalled:
            raise NotPossible("no daemon listens")
        await _revoke_and_readmit(world, fault)


async def _suspend(world: World, fault: Fault) -> None:
    """Suspend the listener's backend, as a debugger or a lack of memory on the machine may do."""
    try:
        async with world.connection() as conn:
            backends = [row["pid"] for row in await conn.fetch(_BACKENDS, LISTENER)]
    except UNREACHABLE as error:
        raise NotPossible(f"{type(error).__name__}: {error}") from error
    if not backends:
        raise NotPossible("no daemon listens")
    with _suspended(backends):
        await _revoke_and_readmit(world, fault)


@contextmanager
def _suspended(processes: list[int]) -> Iterator[None]:
    """Suspend processes for the block, but at most for MAX_SUSPENDED_S seconds: if PostgreSQL is killed meanwhile, it
    does not start again as long as one of its old processes is left."""
    _send(processes, signal.SIGSTOP)
    timer = asyncio.get_running_loop().call_later(MAX_SUSPENDED_S, _send, processes, signal.SIGCONT)
    try:
        yield
    finally:
        timer.cancel()
        _send(processes, signal.SIGCONT)


def _send(processes: list[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _revoke_and_readmit(world: World, fault: Fault) -> None:
    """Revoke a device, which continues to send until after LIMIT_S; then readmit it."""
    managed = world.managed_devices.pick(State.GOOD, fault.dice)
    if managed is None:
        raise NotPossible("no device has a good token")
    await world.managed_devices.revoke(managed)
    await asyncio.sleep(fault.duration_s)
    if managed.is_in(State.REVOKED):
        await world.managed_devices.readmit(managed)


KINDS = (
    FaultKind("listener's connection stalled", Lane.OPERATORS, DURATION_S, _stall, disconnects=False),
    FaultKind(
        "listener's backend suspended", Lane.OPERATORS, DURATION_S, _suspend, own_cluster=True, disconnects=False
    ),
)
