"""A fault is a card; a deck deals them so that each has its turn."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nexhb.jobs.plan import Rules
from tests.timelapse.jobs import Sight
from tests.timelapse.world import World


@dataclass(frozen=True)
class Card:
    """One kind of fault."""

    name: str
    fits: Callable[[World, Sight], bool]  # whether tonight's plan has what it spoils
    play: Callable[[World, Rules, Sight], Awaitable[bool]]  # with the night's run; False where it did not come to it


def whole(_world: World, sight: Sight) -> bool:
    """An attached day is on its way out."""
    return sight.whole


def archives(_world: World, sight: Sight) -> bool:
    """Some day is archived."""
    return bool(sight.leaving)


def supplements(_world: World, sight: Sight) -> bool:
    """Late heartbeats wait for a day that is gone."""
    return sight.supplements


def some_dropped(_world: World, sight: Sight) -> bool:
    """Some days are only in the archive."""
    return bool(sight.dropped)


def always(_world: World, _sight: Sight) -> bool:
    """Any night will do."""
    return True


class Deck:
    """Deals the card that was met least of those that fit; of several, chance says which."""

    def __init__(self, cards: Sequence[Card], rng: random.Random) -> None:
        self._cards = cards
        self._rng = rng
        self._last: Card | None = None  # not again at once: it may not have come to it

    def deal(self, world: World, sight: Sight) -> Card | None:
        """A card for now; None where none fits."""
        fitting = [card for card in self._cards if card is not self._last and card.fits(world, sight)]
        least = min((world.faults[card.name] for card in fitting), default=0)
        rare = [card for card in fitting if world.faults[card.name] == least]
        self._last = self._rng.choice(rare) if rare else None
        return self._last
