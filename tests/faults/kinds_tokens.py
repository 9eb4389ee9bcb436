"""What operators do to devices that are sending: rotate tokens, and revoke, readmit and add devices."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.faults.managed_devices import ManagedDevice, ManagedDevices, State
from tests.faults.nemesis import Fault, FaultKind, Lane, NotPossible
from tests.faults.world import World

Act = Callable[[World, Fault], Awaitable[None]]


def _change(state: State, change: Callable[[ManagedDevices, ManagedDevice], Awaitable[None]]) -> Act:
    """Return a fault that applies `change` to a device whose newest token is in this state. It raises NotPossible."""

    async def act(world: World, fault: Fault) -> None:
        managed = world.managed_devices.pick(state, fault.dice)
        if managed is None:
            raise NotPossible(f"no device has a {state} token")
        await change(world.managed_devices, managed)

    return act


KINDS = (
    FaultKind(
        "token rotated", Lane.OPERATORS, (0.2, 0.5), _change(State.GOOD, ManagedDevices.rotate), disconnects=False
    ),
    FaultKind(
        "device revoked", Lane.OPERATORS, (0.2, 0.5), _change(State.GOOD, ManagedDevices.revoke), disconnects=False
    ),
    FaultKind(
        "device readmitted",
        Lane.OPERATORS,
        (0.2, 0.5),
        _change(State.REVOKED, ManagedDevices.readmit),
        disconnects=False,
    ),
    FaultKind(
        "device added", Lane.OPERATORS, (0.2, 0.5), _change(State.UNKNOWN, ManagedDevices.admit), disconnects=False
    ),
)
