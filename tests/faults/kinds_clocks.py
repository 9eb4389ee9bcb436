"""The database's clock is stepped while the database runs: heartbeats keep their times, the daemon reports that its
host's clock differs, and it is ready again as soon as the database's clock is right."""

from __future__ import annotations

import asyncio
import random
import re
import time
from datetime import timedelta

from tests.faults.faketime import Clock
from tests.faults.kinds_processes import READY_S, own_cluster
from tests.faults.nemesis import Fault, FaultKind, Lane
from tests.faults.world import World

# Large enough for the daemon to notice, but so small that every heartbeat stays within the accept window: the clocks of
# devices start 20 to 70 h behind, and catch up.
STEPS = (timedelta(minutes=9), timedelta(hours=90), timedelta(minutes=-9), timedelta(hours=-9))
# Every heartbeat would be outside the accept window, so no device is connected to the daemon meanwhile.
FAR_BACK = timedelta(days=-3)
POLL_S = 0.05
TOLERANCE_S = 60.0
IN_TRANSIT_S = 0.5  # a heartbeat is received within this time after it is sent
CORRECTED_S = 60.0
_DIFFERENCE = re.compile(r"clock is (\d+) s (behind|ahead of) the database's")


async def _step_clock(world: World, fault: Fault) -> None:
    async with own_cluster(world).with_own_clock() as clock:
        await world.daemons[0].ready(READY_S)
        for step in random.Random(fault.dice).sample(STEPS, 2):  # noqa: S311 - a simulation
            await _step(world, clock, step)
            if world.violations_of_faults:  # after one violation, further steps are not needed
                return
        if fault.dice > 0.4:
            with world.front.closed():
                await asyncio.sleep(IN_TRANSIT_S)
                await _step(world, clock, FAR_BACK)
                await _correct_clock(world, clock)
        await _correct_clock(world, clock)
    await world.daemons[0].ready(READY_S)


async def _step(world: World, clock: Clock, by: timedelta) -> None:
    """Step the database's clock, and expect the daemon to report the difference within READY_S seconds."""
    began, is_only_fault = time.monotonic(), world.disconnecting_faults == 1
    await asyncio.to_thread(clock.step, by)
    while abs(await _reported_difference_s(world) - by.total_seconds()) > TOLERANCE_S:
        if time.monotonic() - began > READY_S:
            if is_only_fault and world.disconnecting_faults == 1 and world.reconnected_at_s < began:
                world.report(
                    "wrong", f"{READY_S:.0f} s after a step of the database's clock by {by}, the daemon is ready"
                )
            return
        await asyncio.sleep(POLL_S)


async def _reported_difference_s(world: World) -> float:
    """Return how many seconds the database's clock is ahead of the daemon's, according to the readiness response."""
    match = _DIFFERENCE.search(await world.daemons[0].reasons())
    return 0.0 if match is None else float(match[1]) * (1 if match[2] == "behind" else -1)


async def _correct_clock(world: World, clock: Clock) -> None:
    """Set the clock right, and wait until the daemon has noticed: a heartbeat that arrived earlier would be stored with
    a wrong time."""
    await asyncio.to_thread(clock.step, timedelta(0))
    await world.daemons[0].ready(CORRECTED_S)


KINDS = (
    FaultKind("database's clock stepped", Lane.PROCESSES, (2.0, 3.0), _step_clock, own_cluster=True, own_clock=True),
)
