"""What is broken, and when: a schedule that follows from the seed alone, and the carrying out of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.faults.record import What
from tests.faults.world import World


@dataclass(frozen=True)
class Kind:
    """One way to break something. Of one lane a fault at a time; lanes run side by side."""

    name: str
    lane: str  # processes · database line · device line · tables · operators
    lasts_s: tuple[float, float]
    act: Callable[[World, Fault], Awaitable[None]]
    weight: int = 1
    own_cluster: bool = False  # only where the database is the run's own
    small_disk: bool = False
    own_clock: bool = False  # PostgreSQL's, which is not the machine's
    parts: bool = True  # daemon and database may not hear each other while it lasts


class Fault(NamedTuple):
    """One entry of the schedule."""

    kind: Kind
    pause_s: float  # since the end of the one before, on its lane
    lasts_s: float
    dice: float  # 0 to 1: what else is to be decided


@dataclass
class Struck:
    """A fault that was carried out."""

    fault: Fault
    at_s: float
    ended_s: float
    in_flight: int  # requests without an answer when it struck
    unknown: int  # outcomes that devices do not know, by its end
    refused: int
    failed: str = ""  # why it could not be carried out


GOLDEN = 0.618
PAUSE_S = (0.1, 0.9)
GRACE_S = 0.2  # behind a fault: what it did to devices is heard by then


def schedule(seed: int, kinds: Sequence[Kind], seconds: float) -> dict[str, list[Fault]]:
    """The faults of each lane, in their order. The same for the same arguments."""
    found: dict[str, list[Fault]] = {}
    for lane in sorted({kind.lane for kind in kinds}):
        rng = random.Random(f"nexhb nemesis:{seed}:{lane}")  # noqa: S311 - a simulation
        those = [kind for kind in kinds if kind.lane == lane]
        at_s, faults = 0.0, []
        bag: list[Kind] = []
        while True:
            # Each as often as its weight says before any comes again: a short run meets many kinds.
            if not bag:
                bag = [kind for kind in those for _ in range(kind.weight)]
                rng.shuffle(bag)
            kind = bag.pop()
            pause_s, lasts_s = round(rng.uniform(*PAUSE_S), 3), round(rng.uniform(*kind.lasts_s), 3)
            lasts_s = min(lasts_s, max(kind.lasts_s[0], round(seconds - at_s - pause_s, 3)))
            at_s += pause_s + lasts_s + GRACE_S
            if at_s > seconds:
                break
            faults.append(Fault(kind, pause_s, lasts_s, rng.random()))
        found[lane] = faults
    return found


def once(kind: Kind, number: int) -> dict[str, list[Fault]]:
    """A schedule of a single fault, the number-th of its kind: what it decides by dice comes out evenly after a few."""
    dice = (0.5 + number * GOLDEN) % 1
    return {kind.lane: [Fault(kind, PAUSE_S[0], kind.lasts_s[0] + dice * (kind.lasts_s[1] - kind.lasts_s[0]), dice)]}


async def unleash(world: World, plan: dict[str, list[Fault]]) -> list[Struck]:
    """Carry it out, each lane by itself; what struck, in order of time."""
    lanes = [asyncio.create_task(_lane(world, faults)) for faults in plan.values()]
    try:
        struck = [one for lane in await asyncio.gather(*lanes) for one in lane]
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return sorted(struck, key=lambda one: one.at_s)


async def _lane(world: World, faults: Sequence[Fault]) -> list[Struck]:
    struck = []
    for fault in faults:
        await asyncio.sleep(fault.pause_s)
        began, counts, waiting = time.monotonic(), world.record.counts.copy(), world.waiting
        failed = ""
        world.apart += fault.kind.parts
        try:
            await fault.kind.act(world, fault)
        except Unable as error:
            failed = str(error)
        finally:
            world.apart -= fault.kind.parts
            if fault.kind.parts:
                world.together_since_s = time.monotonic()
        await asyncio.sleep(GRACE_S)
        now = world.record.counts
        struck.append(
            Struck(
                fault,
                began,
                time.monotonic(),
                waiting,
                now[What.UNKNOWN] - counts[What.UNKNOWN],
                now[What.REFUSED] - counts[What.REFUSED],
                failed,
            )
        )
    return struck


class Unable(Exception):
    """This fault could not be carried out just now: what it would break is not there."""
