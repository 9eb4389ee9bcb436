"""Simulate a night: its rules, perhaps faults, the runs of the jobs, and the checks after them."""

from __future__ import annotations

from datetime import timedelta

from nexhb.jobs.plan import NightlyRules
from tests.timelapse import jobs, kills, late, operators, other_sessions, storage
from tests.timelapse.fault_kinds import FaultKind, FaultPicker, has_dropped_day
from tests.timelapse.jobs import TonightsPlan
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.world import START, World

_WEEK = timedelta(days=7)
_WITHOUT_FAULTS = timedelta(days=3)  # the last nights, which restore or archive the remaining days
_NO_DETACH = _WITHOUT_FAULTS + timedelta(days=2)


async def _miss_week(world: World, _rules: NightlyRules, _tonight: TonightsPlan) -> bool:
    world.paused_until = world.now + _WEEK
    return True


def _can_miss_week(world: World, _tonight: TonightsPlan) -> bool:
    before_the_end = world.now + _WEEK < world.settings.end - _WITHOUT_FAULTS
    return before_the_end and world.faults["a missed week"] < world.settings.missed_weeks and world.now - START > _WEEK


async def _restore(world: World, rules: NightlyRules, tonight: TonightsPlan) -> bool:
    await operators.restore_day(world, world.rng.choice(tonight.dropped_days), world.rng.randint(1, 4))
    await jobs.run_successfully(world, rules)
    return True


async def _detach_day(world: World, rules: NightlyRules, tonight: TonightsPlan) -> bool:
    """Detach a recent day after the run: heartbeats for that day keep arriving, and the next run archives the day."""
    await jobs.run_successfully(world, rules)
    await operators.detach_day(world, world.rng.choice(tonight.recent_days))
    return True


def _has_recent_day(world: World, tonight: TonightsPlan) -> bool:
    return bool(tonight.recent_days) and world.now < world.settings.end - _NO_DETACH


KINDS = (
    *kills.KINDS,
    *storage.KINDS,
    *other_sessions.KINDS,
    FaultKind("a missed week", _can_miss_week, _miss_week),
    FaultKind("a day restored for some nights", has_dropped_day, _restore),
    FaultKind("a recent day detached", _has_recent_day, _detach_day),
)


async def night(world: World, picker: FaultPicker) -> None:
    """Simulate a night: up to three faults in sequence, then perhaps a run without a fault, which must complete what
    the faults interrupted."""
    settings = world.settings
    rules = settings.rules(_retention_days(world))
    await operators.release(world)
    has_faults = world.now < settings.end - _WITHOUT_FAULTS and world.rng.random() < settings.faulty_nights
    for _ in range(world.rng.randint(1, settings.faults_a_night) if has_faults else 0):
        await _fault(world, picker, rules)
        if world.now < world.paused_until:
            return
        world.now += timedelta(minutes=10)
    if not has_faults or world.rng.random() < 0.5:
        await _run_without_fault(world, rules)


async def _fault(world: World, picker: FaultPicker, rules: NightlyRules) -> None:
    tonight = await jobs.read_plan(world, rules)
    kept_days = (world.now.date() - tonight.oldest_day).days
    if not tonight.days_to_archive and kept_days > 3 and world.rng.random() < world.settings.shortened:
        world.faults["retention shortened by a day"] += 1
        rules = world.settings.rules(kept_days - 1)
        tonight = await jobs.read_plan(world, rules)
    kind = picker.pick(world, tonight)
    if kind is None:
        return
    world.current_fault = kind.name
    if await kind.run_night(world, rules, tonight):
        world.faults[kind.name] += 1
    await late.send_late(world)
    world.current_fault = ""


def _retention_days(world: World) -> int:
    """Return tonight's retention in days. Sometimes the retention is far too short, provided that this has no effect on
    the result at the end."""
    settings = world.settings
    if world.now < settings.short_until and world.now - START > timedelta(days=3) and world.rng.random() < 0.4:
        world.faults["retention of only a few days"] += 1
        return world.rng.randint(2, 6)
    return settings.retention_days


_UNFINISHED = """
    WITH attached AS (SELECT p.* FROM hb_partitions p JOIN pg_inherits ON inhrelid = to_regclass(partition_name))
    SELECT (SELECT count(*) FROM pg_inherits WHERE inhdetachpending) AS pending,
           (SELECT count(*) FROM hb_partitions WHERE to_regclass(partition_name) IS NOT NULL)
           - (SELECT count(*) FROM attached) AS detached,
           (SELECT count(*) FROM attached WHERE state <> 'active') AS attached_and_not_active,
           (SELECT count(*) FROM attached a JOIN late_heartbeats l ON l.ts >= a.range_start AND l.ts < a.range_end)
               AS late_and_attached,
           (SELECT count(*) FROM job_runs WHERE status = 'running') AS running"""


async def _run_without_fault(world: World, rules: NightlyRules) -> None:
    """Check that a run without a fault completes everything, whatever the earlier runs left unfinished."""
    await jobs.run_successfully(world, rules)
    [unfinished] = await world.conn.fetch(_UNFINISHED)
    if any(unfinished):
        raise BrokenPromise(f"A night without a fault left something unfinished: {dict(unfinished)}")


async def restore_days_archived_early(world: World) -> None:
    """Before the end, restore the days that were archived too early, as an operator would."""
    first = world.settings.end.date() - timedelta(days=world.settings.retention_days)
    tonight = await jobs.read_plan(world, world.settings.rules())
    for day in tonight.dropped_days:
        if day >= first:
            await operators.restore_day(world, day, 0)
            world.faults["a day restored at the end"] += 1
    await operators.release(world, everything=True)
