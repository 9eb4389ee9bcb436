"""The schedule of faults, which depends on the seed alone, and the functions that inject the faults."""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.faults.journal import Event
from tests.faults.world import World


class Lane(enum.StrEnum):
    """A sequence of faults, one at a time; the lanes run concurrently. A schedule depends on the seed and on these
    values: if one of the values changes, every seed has different faults in that lane."""

    PROCESSES = "processes"
    DATABASE_CONNECTIONS = "database line"
    DEVICE_CONNECTIONS = "device line"
    TABLES = "tables"
    OPERATORS = "operators"


@dataclass(frozen=True)
class FaultKind:
    """One way to break something."""

    name: str
    lane: Lane
    duration_s: tuple[float, float]
    act: Callable[[World, Fault], Awaitable[None]]
    weight: int = 1
    own_cluster: bool = False  # requires that PostgreSQL belongs to the run
    small_disk: bool = False  # requires PostgreSQL on a small disk
    own_clock: bool = False  # requires libfaketime, which gives PostgreSQL a clock of its own
    disconnects: bool = True  # the fault may disconnect daemon and database


class Fault(NamedTuple):
    """One entry of the schedule."""

    kind: FaultKind
    pause_s: float  # after the end of the lane's previous fault
    duration_s: float
    dice: float  # a random number from 0 to 1, with which the fault chooses among its variants


@dataclass
class InjectedFault:
    """A fault with its effects, or with the reason why it could not be injected."""

    fault: Fault
    at_s: float
    ended_s: float
    in_flight: int  # requests without a response when the fault began
    unknown: int  # attempts during the fault whose outcome the devices do not know
    refused: int
    failed: str = ""  # why the fault could not be injected


GOLDEN_RATIO = 0.618
PAUSE_S = (0.1, 0.9)
GRACE_S = 0.2  # from the end of a fault until its effects on the devices are counted


def schedule(seed: int, kinds: Sequence[FaultKind], seconds: float) -> dict[Lane, list[Fault]]:
    """Return the faults of each lane, in order. The same arguments produce the same schedule."""
    plan: dict[Lane, list[Fault]] = {}
    for lane in sorted({kind.lane for kind in kinds}):
        rng = random.Random(f"nexhb nemesis:{seed}:{lane}")  # noqa: S311 - a simulation
        kinds_of_lane = [kind for kind in kinds if kind.lane == lane]
        at_s, faults = 0.0, []
        bag: list[FaultKind] = []
        while True:
            # The bag has each kind as often as its weight, and is refilled only when it is empty, so that a short run
            # has many kinds.
            if not bag:
                bag = [kind for kind in kinds_of_lane for _ in range(kind.weight)]
                rng.shuffle(bag)
            kind = bag.pop()
            pause_s, duration_s = round(rng.uniform(*PAUSE_S), 3), round(rng.uniform(*kind.duration_s), 3)
            duration_s = min(duration_s, max(kind.duration_s[0], round(seconds - at_s - pause_s, 3)))
            at_s += pause_s + duration_s + GRACE_S
            if at_s > seconds:
                break
            faults.append(Fault(kind, pause_s, duration_s, rng.random()))
        plan[lane] = faults
    return plan


def single_fault(kind: FaultKind, number: int) -> dict[Lane, list[Fault]]:
    """Return a schedule of one fault, the `number`-th of its kind. With successive numbers, `dice` is spread evenly
    from 0 to 1."""
    dice = (0.5 + number * GOLDEN_RATIO) % 1
    return {
        kind.lane: [
            Fault(kind, PAUSE_S[0], kind.duration_s[0] + dice * (kind.duration_s[1] - kind.duration_s[0]), dice)
        ]
    }


async def inject(world: World, plan: dict[Lane, list[Fault]]) -> list[InjectedFault]:
    """Inject the faults of a schedule, all lanes concurrently, and return them in order of time."""
    lanes = [asyncio.create_task(_lane(world, faults)) for faults in plan.values()]
    try:
        faults = [fault for lane in await asyncio.gather(*lanes) for fault in lane]
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return sorted(faults, key=lambda fault: fault.at_s)


async def _lane(world: World, faults: Sequence[Fault]) -> list[InjectedFault]:
    injected = []
    for fault in faults:
        await asyncio.sleep(fault.pause_s)
        began, counts_before, in_flight = time.monotonic(), world.journal.counts.copy(), world.in_flight
        failed = ""
        world.disconnecting_faults += fault.kind.disconnects
        try:
            await fault.kind.act(world, fault)
        except NotPossible as error:
            failed = str(error)
        finally:
            world.disconnecting_faults -= fault.kind.disconnects
            if fault.kind.disconnects:
                world.reconnected_at_s = time.monotonic()
        await asyncio.sleep(GRACE_S)
        counts = world.journal.counts
        injected.append(
            InjectedFault(
                fault,
                began,
                time.monotonic(),
                in_flight,
                counts[Event.UNKNOWN] - counts_before[Event.UNKNOWN],
                counts[Event.REFUSED] - counts_before[Event.REFUSED],
                failed,
            )
        )
    return injected


class NotPossible(Exception):
    """The fault cannot be injected at present, for example because no daemon is running."""
