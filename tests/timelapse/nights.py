"""One night: the day's rules, a card or none, the runs, and what must hold behind them."""

from __future__ import annotations

from datetime import timedelta

from nexhb.jobs.plan import Rules
from tests.timelapse import busy, jobs, kills, late, operators, storage
from tests.timelapse.cards import Card, Deck, some_dropped
from tests.timelapse.jobs import Sight
from tests.timelapse.ledger import Broken
from tests.timelapse.world import START, World

_WEEK = timedelta(days=7)
_CALM = timedelta(days=3)  # at the end, to bring back and to archive what is left
_YOUNG_LEAVE = _CALM + timedelta(days=2)


async def _miss_a_week(world: World, _rules: Rules, _sight: Sight) -> bool:
    world.asleep_until = world.now + _WEEK
    return True


def _week_fits(world: World, _sight: Sight) -> bool:
    before_the_end = world.now + _WEEK < world.settings.end - _CALM
    return before_the_end and world.faults["a missed week"] < world.settings.missed_weeks and world.now - START > _WEEK


async def _restore(world: World, rules: Rules, sight: Sight) -> bool:
    await operators.bring_back(world, world.rng.choice(sight.dropped), world.rng.randint(1, 4))
    await jobs.run_well(world, rules)
    return True


async def _take_out(world: World, rules: Rules, sight: Sight) -> bool:
    """Behind the run: for a whole day heartbeats come for it, and the next run archives it."""
    await jobs.run_well(world, rules)
    await operators.take_out(world, world.rng.choice(sight.young))
    return True


def _some_young(world: World, sight: Sight) -> bool:
    return bool(sight.young) and world.now < world.settings.end - _YOUNG_LEAVE


CARDS = (
    *kills.CARDS,
    *storage.CARDS,
    *busy.CARDS,
    Card("a missed week", _week_fits, _miss_a_week),
    Card("a day restored for some nights", some_dropped, _restore),
    Card("a young day detached", _some_young, _take_out),
)


async def night(world: World, deck: Deck) -> None:
    """Tonight's: up to three faults, one behind the other, and then perhaps a run that makes up for them."""
    settings = world.settings
    rules = settings.rules(_keep(world))
    await operators.release(world)
    faulty = world.now < settings.end - _CALM and world.rng.random() < settings.faulty_nights
    for _ in range(world.rng.randint(1, settings.faults_a_night) if faulty else 0):
        await _fault(world, deck, rules)
        if world.now < world.asleep_until:
            return
        world.now += timedelta(minutes=10)
    if not faulty or world.rng.random() < 0.5:
        await _calm(world, rules)


async def _fault(world: World, deck: Deck, rules: Rules) -> None:
    sight = await jobs.look(world, rules)
    kept = (world.now.date() - sight.oldest).days
    if not sight.leaving and kept > 3 and world.rng.random() < world.settings.shortened:
        world.faults["retention shortened by a day"] += 1
        rules = world.settings.rules(kept - 1)
        sight = await jobs.look(world, rules)
    card = deck.deal(world, sight)
    if card is None:
        return
    world.playing = card.name
    if await card.play(world, rules, sight):
        world.faults[card.name] += 1
    await late.send_late(world)
    world.playing = ""


def _keep(world: World) -> int:
    """How many days are kept: now and then far too few, as long as that can be forgotten by the end."""
    settings = world.settings
    if world.now < settings.short_until and world.now - START > timedelta(days=3) and world.rng.random() < 0.4:
        world.faults["retention of some days only"] += 1
        return world.rng.randint(2, 6)
    return settings.retention_days


_LEFT = """
    WITH attached AS (SELECT p.* FROM hb_partitions p JOIN pg_inherits ON inhrelid = to_regclass(partition_name))
    SELECT (SELECT count(*) FROM pg_inherits WHERE inhdetachpending) AS pending,
           (SELECT count(*) FROM hb_partitions WHERE to_regclass(partition_name) IS NOT NULL)
           - (SELECT count(*) FROM attached) AS detached,
           (SELECT count(*) FROM attached WHERE state <> 'active') AS attached_and_not_active,
           (SELECT count(*) FROM attached a JOIN late_heartbeats l ON l.ts >= a.range_start AND l.ts < a.range_end)
               AS late_and_attached,
           (SELECT count(*) FROM job_runs WHERE status = 'running') AS running"""


async def _calm(world: World, rules: Rules) -> None:
    """A run without a fault leaves nothing undone, whatever the runs before it left."""
    await jobs.run_well(world, rules)
    [left] = await world.conn.fetch(_LEFT)
    if any(left):
        raise Broken(f"A calm night left something undone: {dict(left)}")


async def bring_everything_back(world: World) -> None:
    """What left too early comes back before the end: an operator has noticed."""
    first = world.settings.end.date() - timedelta(days=world.settings.retention_days)
    sight = await jobs.look(world, world.settings.rules())
    for day in sight.dropped:
        if day >= first:
            await operators.bring_back(world, day, 0)
            world.faults["a day brought back at the end"] += 1
    await operators.release(world, everything=True)
