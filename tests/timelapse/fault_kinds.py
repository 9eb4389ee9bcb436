"""The kinds of faults that may affect a night, and the choice of the next one."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nexhb.jobs.plan import NightlyRules
from tests.timelapse.jobs import TonightsPlan
from tests.timelapse.world import World


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    name: str
    is_possible: Callable[[World, TonightsPlan], bool]
    # Runs the nightly job with the fault; returns False if the fault did not happen.
    run_night: Callable[[World, NightlyRules, TonightsPlan], Awaitable[bool]]


def has_attached_day(_world: World, tonight: TonightsPlan) -> bool:
    """Return whether an attached day is to be archived."""
    return tonight.has_attached_day


def has_day_to_archive(_world: World, tonight: TonightsPlan) -> bool:
    """Return whether a day is to be archived."""
    return bool(tonight.days_to_archive)


def has_supplements(_world: World, tonight: TonightsPlan) -> bool:
    """Return whether late heartbeats of an archived day have to be archived as a supplement."""
    return tonight.has_supplements


def has_dropped_day(_world: World, tonight: TonightsPlan) -> bool:
    """Return whether some days are only in the archive."""
    return bool(tonight.dropped_days)


def always(_world: World, _tonight: TonightsPlan) -> bool:
    """Return True: this fault is possible in any night."""
    return True


class FaultPicker:
    """Picks the possible kind that has happened least often; of several such kinds, a random one."""

    def __init__(self, kinds: Sequence[FaultKind], rng: random.Random) -> None:
        self._kinds = kinds
        self._rng = rng
        self._last: FaultKind | None = None  # the kind picked last is not picked next, as perhaps it could not happen

    def pick(self, world: World, tonight: TonightsPlan) -> FaultKind | None:
        """Return a kind for tonight; None if no kind is possible."""
        possible = [kind for kind in self._kinds if kind is not self._last and kind.is_possible(world, tonight)]
        fewest = min((world.faults[kind.name] for kind in possible), default=0)
        rarest = [kind for kind in possible if world.faults[kind.name] == fewest]
        self._last = self._rng.choice(rarest) if rarest else None
        return self._last
