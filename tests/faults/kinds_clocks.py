"""The database's own clock, which jumps while it runs: heartbeats keep their times, the daemon says that its host's
clock is another, and all is as before when both are right."""

from __future__ import annotations

import asyncio
import random
import re
import time
from datetime import timedelta

from tests.faults.faketime import Clock
from tests.faults.kinds_processes import READY_S, own_cluster
from tests.faults.nemesis import Fault, Kind
from tests.faults.world import World

# So far that it is noticed, and no heartbeat falls out of the accept window: devices are 20 to 70 h behind, and catch
# up.
STEPS = (timedelta(minutes=9), timedelta(hours=90), timedelta(minutes=-9), timedelta(hours=-9))
FAR_BACK = timedelta(days=-3)  # and here every heartbeat would: devices are kept away meanwhile
LOOK_S = 0.05
NEAR_S = 60.0
ON_ITS_WAY_S = 0.5  # what was sent before is received by then
RIGHT_S = 60.0
_APART = re.compile(r"clock is (\d+) s (behind|ahead of) the database's")


async def _jump(world: World, fault: Fault) -> None:
    async with own_cluster(world).by_a_clock_of_its_own() as clock:
        await world.daemons[0].ready(READY_S)
        for step in random.Random(fault.dice).sample(STEPS, 2):  # noqa: S311 - a simulation
            await _stepped(world, clock, step)
            if world.blamed:  # enough is known
                return
        if fault.dice > 0.4:
            with world.front.closed():
                await asyncio.sleep(ON_ITS_WAY_S)
                await _stepped(world, clock, FAR_BACK)
                await _right_again(world, clock)
        await _right_again(world, clock)
    await world.daemons[0].ready(READY_S)


async def _stepped(world: World, clock: Clock, by: timedelta) -> None:
    """The clock is so far ahead now, and the daemon is to say so."""
    began, alone = time.monotonic(), world.apart == 1
    await asyncio.to_thread(clock.step, by)
    while abs(await _said_s(world) - by.total_seconds()) > NEAR_S:
        if time.monotonic() - began > READY_S:
            if alone and world.apart == 1 and world.together_since_s < began:
                world.blame("wrong", f"{READY_S:.0f} s after the database's clock jumped by {by} the daemon is ready")
            return
        await asyncio.sleep(LOOK_S)


async def _said_s(world: World) -> float:
    """How far the database's clock is ahead, by what the daemon says of its readiness."""
    said = _APART.search(await world.daemons[0].reasons())
    return 0.0 if said is None else float(said[1]) * (1 if said[2] == "behind" else -1)


async def _right_again(world: World, clock: Clock) -> None:
    """Not before the daemon has seen it a heartbeat may come: it would be stored at a time that is wrong."""
    await asyncio.to_thread(clock.step, timedelta(0))
    await world.daemons[0].ready(RIGHT_S)


KINDS = (Kind("database's clock jumps", "processes", (2.0, 3.0), _jump, own_cluster=True, own_clock=True),)
