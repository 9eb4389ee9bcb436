"""Faults of connections and their messages: between the daemon and the database, and between devices and daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World
from tests.proxy import CommitFault, Direction, Proxy, Relay

PATIENCE_S = 3.0  # added to the fault's duration: a concurrent fault may hold back every message for a while

Pick = Callable[[World], Relay]
Act = Callable[[World, Fault], Awaitable[None]]


def _database(world: World) -> Proxy:
    """Return the proxy between a running daemon and the database: the second daemon's if both run."""
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
            await asyncio.sleep(fault.duration_s)
        finally:
            relay.delay_s = 0.0

    return act


def _stalled(pick: Pick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        with pick(world).stalled():
            await asyncio.sleep(fault.duration_s)

    return act


def _unreachable(pick: Pick) -> Act:
    async def act(world: World, fault: Fault) -> None:
        relay = pick(world)
        relay.make_unreachable()
        try:
            await asyncio.sleep(fault.duration_s)
        finally:
            relay.make_reachable()

    return act


async def _applied(relay: Relay, fault: Fault) -> None:
    """Wait until the relay has applied the fault to a message. Raises NotPossible if no message passes in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(fault.duration_s + PATIENCE_S):
            await relay.fault_applied.wait()
            return
    raise NotPossible("no such message passed")


def _truncated(pick: Pick, direction: Direction) -> Act:
    async def act(world: World, fault: Fault) -> None:
        relay = pick(world)
        relay.fault_applied.clear()
        relay.truncated.add(direction)
        try:
            await _applied(relay, fault)
        finally:
            relay.truncated.discard(direction)

    return act


def _commit(commit_fault: CommitFault) -> Act:
    async def act(world: World, fault: Fault) -> None:
        proxy = _database(world)
        proxy.fault_applied.clear()
        proxy.commit_fault = commit_fault
        try:
            await _applied(proxy, fault)
        finally:
            proxy.commit_fault = CommitFault.NONE

    return act


def _either(
    lane: Lane, pick: Pick, connections: str, outbound: str, inbound: str, *, disconnects: bool
) -> tuple[FaultKind, ...]:
    """Return the kinds that exist for both relays."""
    kinds = (
        FaultKind(f"{connections} cut", lane, (0.0, 0.1), _now(pick, Relay.cut)),
        FaultKind(f"{connections} reset", lane, (0.0, 0.1), _now(pick, Relay.reset)),
        FaultKind(f"{connections} slow", lane, (0.5, 2.0), _slow(pick)),
        FaultKind(f"{outbound} truncated", lane, (1.0, 2.0), _truncated(pick, Direction.TO_SERVER)),
        FaultKind(f"{inbound} truncated", lane, (1.0, 2.0), _truncated(pick, Direction.TO_CLIENT)),
    )
    return tuple(replace(kind, disconnects=disconnects) for kind in kinds)


_TO_DATABASE, _OF_DEVICES = Lane.DATABASE_CONNECTIONS, Lane.DEVICE_CONNECTIONS
DATABASE = (
    *_either(
        _TO_DATABASE, _database, "connections to the database", "message to the database", "message from the database",
        disconnects=True,
    ),
    FaultKind("connections to the database stalled", _TO_DATABASE, (0.5, 7.0), _stalled(_database)),
    FaultKind("database unreachable", _TO_DATABASE, (0.5, 8.0), _unreachable(_database)),
    FaultKind("response to COMMIT lost", _TO_DATABASE, (1.0, 2.0), _commit(CommitFault.LOSE_RESPONSE), weight=3),
    FaultKind("connection cut before COMMIT", _TO_DATABASE, (1.0, 2.0), _commit(CommitFault.CUT_BEFORE)),
    FaultKind("COMMIT hangs", _TO_DATABASE, (1.0, 2.0), _commit(CommitFault.HANG)),
)  # fmt: skip
DEVICES = (
    *_either(_OF_DEVICES, _devices, "connections of devices", "request", "response", disconnects=False),
    FaultKind("connections of devices stalled", _OF_DEVICES, (0.5, 6.0), _stalled(_devices), disconnects=False),
    FaultKind("daemon unreachable", _OF_DEVICES, (0.2, 1.5), _unreachable(_devices), disconnects=False),
    FaultKind(
        "responses lost", _OF_DEVICES, (0.0, 0.1), _now(_devices, Relay.lose_responses), weight=3, disconnects=False
    ),
)
KINDS = DATABASE + DEVICES
