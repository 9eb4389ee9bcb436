"""What happens to messages: between the daemon and the database, and between the devices and the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.world import World
from tests.proxy import Proxy, Relay, Trick, Way

PATIENCE_S = 3.0  # another lane's fault may keep every message away for a while

Pick = Callable[[World], Relay]
Act = Callable[[World, Fault], Awaitable[None]]


def _database(world: World) -> Proxy:
    """The line of a daemon that runs; with two of them, the second's."""
    return world.proxies[1 if world.daemons[1].is_running else 0]


def _devices(world: World) -> Relay:
    return world.front


def _now(pick: Pick, do: Callable[[Relay], None]) -> Act:
    async def act(world: World, _fault: Fault) -> None:
        do(pick(world))

    return act


def _slow(pick: Pick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        relay = pick(world)
        relay.delay_s = 0.02 + 0.2 * fault.dice
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            relay.delay_s = 0.0

    return act


def _stalled(pick: Pick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        with pick(world).stalled():
            await asyncio.sleep(fault.lasts_s)

    return act


def _away(pick: Pick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        relay = pick(world)
        relay.take_away()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            relay.give_back()

    return act


async def _played(relay: Relay, fault: Fault) -> None:
    """Until a message came along that the trick is for."""
    with suppress(TimeoutError):
        async with asyncio.timeout(fault.lasts_s + PATIENCE_S):
            await relay.played.wait()
            return
    raise Unable("nothing came along")


def _half(pick: Pick, way: Way) -> Act:
    async def act(world: World, fault: Fault) -> None:
        relay = pick(world)
        relay.played.clear()
        relay.half.add(way)
        try:
            await _played(relay, fault)
        finally:
            relay.half.discard(way)

    return act


def _commit(trick: Trick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        proxy = _database(world)
        proxy.played.clear()
        proxy.trick = trick
        try:
            await _played(proxy, fault)
        finally:
            proxy.trick = Trick.NONE

    return act


def _both(lane: str, pick: Pick, whose: str, there: str, back: str) -> tuple[Kind, ...]:
    kinds = (
        Kind(f"{whose} line cut", lane, (0.0, 0.1), _now(pick, Relay.cut)),
        Kind(f"{whose} line reset", lane, (0.0, 0.1), _now(pick, Relay.reset)),
        Kind(f"{whose} line slow", lane, (0.5, 2.0), _slow(pick)),
        Kind(there, lane, (1.0, 2.0), _half(pick, Way.THERE)),
        Kind(back, lane, (1.0, 2.0), _half(pick, Way.BACK)),
    )
    return tuple(replace(kind, parts=pick is _database) for kind in kinds)


DATABASE = (
    *_both(
        "database line", _database, "database", "half a message to the database", "half a message from the database"
    ),
    Kind("database line stalled", "database line", (0.5, 7.0), _stalled(_database)),
    Kind("database away", "database line", (0.5, 8.0), _away(_database)),
    Kind("COMMIT's answer swallowed", "database line", (1.0, 2.0), _commit(Trick.SWALLOW_ANSWER), weight=3),
    Kind("cut before COMMIT", "database line", (1.0, 2.0), _commit(Trick.CUT_BEFORE)),
    Kind("COMMIT hangs", "database line", (1.0, 2.0), _commit(Trick.HANG)),
)
DEVICES = (
    *_both("device line", _devices, "devices'", "half a request", "half an answer"),
    Kind("devices' line stalled", "device line", (0.5, 6.0), _stalled(_devices), parts=False),
    Kind("daemon unreachable", "device line", (0.2, 1.5), _away(_devices), parts=False),
    Kind("answers swallowed", "device line", (0.0, 0.1), _now(_devices, Relay.deafen), weight=3, parts=False),
)
KINDS = DATABASE + DEVICES
