"""The daemon's listener stands still, and everything else goes on: what it does not hear is in force all the same."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.faults.guests import BOUND_S, MACHINE_S, State
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.tables import UNREACHABLE
from tests.faults.world import World

LISTENER = "nexhb devices"
LASTS_S = (BOUND_S + MACHINE_S + 1.0, BOUND_S + MACHINE_S + 2.0)  # devices have to come again behind the bound
AT_MOST_S = 15.0
_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"


async def _stall(world: World, fault: Fault) -> None:
    """Its line: what it opens instead passes."""
    with world.proxies[1 if world.daemons[1].is_running else 0].frozen(LISTENER) as lines:
        if not lines:
            raise Unable("nobody listens")
        await _revoked(world, fault)


async def _stop(world: World, fault: Fault) -> None:
    """Its backend, as a debugger or a machine without memory does."""
    try:
        async with world.connection() as conn:
            backends = [row["pid"] for row in await conn.fetch(_BACKENDS, LISTENER)]
    except UNREACHABLE as error:
        raise Unable(f"{type(error).__name__}: {error}") from error
    if not backends:
        raise Unable("nobody listens")
    with _stopped(backends):
        await _revoked(world, fault)


@contextmanager
def _stopped(processes: list[int]) -> Iterator[None]:
    """At most for AT_MOST_S: where PostgreSQL is killed meanwhile, it does not start beside what is left of it."""
    _send(processes, signal.SIGSTOP)
    timer = asyncio.get_running_loop().call_later(AT_MOST_S, _send, processes, signal.SIGCONT)
    try:
        yield
    finally:
        timer.cancel()
        _send(processes, signal.SIGCONT)


def _send(processes: list[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _revoked(world: World, fault: Fault) -> None:
    """A device is revoked, and sends until behind the bound; then it is readmitted."""
    guest = world.guests.pick(State.GOOD, fault.dice)
    if guest is None:
        raise Unable("there is no device whose token is good")
    await world.guests.revoke(guest)
    await asyncio.sleep(fault.lasts_s)
    if guest.may_be(State.REVOKED):
        await world.guests.readmit(guest)


KINDS = (
    Kind("listener's line stalled", "operators", LASTS_S, _stall, parts=False),
    Kind("listener's backend stopped", "operators", LASTS_S, _stop, own_cluster=True, parts=False),
)
