"""What operators do to devices: tokens are rotated, devices revoked, readmitted, made known while they send."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.faults.guests import Guest, Guests, State
from tests.faults.nemesis import Fault, Kind, Unable
from tests.faults.world import World

Act = Callable[[World, Fault], Awaitable[None]]


def _changed(of: State, do: Callable[[Guests, Guest], Awaitable[None]]) -> Act:
    """Of some device whose token stands so."""

    async def act(world: World, fault: Fault) -> None:
        guest = world.guests.pick(of, fault.dice)
        if guest is None:
            raise Unable(f"there is no device whose token is {of}")
        await do(world.guests, guest)

    return act


KINDS = (
    Kind("token rotated", "operators", (0.2, 0.5), _changed(State.GOOD, Guests.rotate), parts=False),
    Kind("device revoked", "operators", (0.2, 0.5), _changed(State.GOOD, Guests.revoke), parts=False),
    Kind("device readmitted", "operators", (0.2, 0.5), _changed(State.REVOKED, Guests.readmit), parts=False),
    Kind("device made known", "operators", (0.2, 0.5), _changed(State.UNKNOWN, Guests.admit), parts=False),
)
