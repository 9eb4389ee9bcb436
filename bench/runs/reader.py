"""Somebody reads the history for long while the nightly run changes it: ingest does not wait for them."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Final, NamedTuple

import asyncpg
import uvloop

from bench import old_days, progress, stack
from bench.finding import Finding, of_trial, spread
from bench.fleet import make_fleet, schedule
from bench.load import open_loop, target
from bench.night import Night, nightly
from bench.report import Limit, Percentiles, hold
from bench.runs.archive import SETTINGS, due_in, old_days_of
from bench.scenarios import ReaderScenario
from bench.trial import Trial, examine
from nexhb.partitions import LOCK_TIMEOUT_MS, name_of

_SEED: Final = 1
_DAYS_AHEAD: Final = 14


class _Nights(NamedTuple):
    trial: Trial
    # while the reader reads, and once it is gone
    read: Night
    free: Night
    while_read: Percentiles
    while_free: Percentiles


def run(scenario: ReaderScenario) -> Finding:
    """Let somebody read, run the nightly run, let the reader go, run it again."""
    fleet = make_fleet(scenario.devices, _SEED)
    with stack.running(fleet, settings=SETTINGS) as own:
        today = datetime.now(UTC).date()
        _, old = old_days_of(today)
        made_again = [today + timedelta(days=_DAYS_AHEAD - n) for n in range(scenario.days_made)]
        uvloop.run(_prepare(scenario, own, old, made_again))
        nights = uvloop.run(_nights(scenario, own))
        state, there = uvloop.run(_state(own, old, made_again))
    return _finding(scenario, nights, name_of(old), state, there)


async def _prepare(scenario: ReaderScenario, own: stack.Stack, old: date, made_again: list[date]) -> None:
    """A day to be archived, and days ahead that are missing."""
    conn = await own.connect()
    try:
        await old_days.make(conn, make_fleet(scenario.devices, _SEED), old, scenario.beats, _SEED)
        for day in made_again:
            await conn.execute(f"DROP TABLE {name_of(day)}")
            await conn.execute("DELETE FROM hb_partitions WHERE partition_name = $1", name_of(day))
    finally:
        await conn.close(timeout=5)


async def _nights(scenario: ReaderScenario, own: stack.Stack) -> _Nights:
    fleet = make_fleet(scenario.devices, _SEED)
    plan = schedule(scenario.devices, scenario.interval_s, scenario.jitter_s, scenario.most_s, _SEED)
    done = asyncio.Event()
    with progress.line(len(plan), "heartbeats acknowledged, at most") as show:
        sending = asyncio.create_task(
            open_loop(target(own.url), fleet, plan, pid=own.pid, seed=_SEED, progress=show, until=done)
        )
        try:
            await asyncio.sleep(scenario.before_s)
            read = await _while_somebody_reads(own, scenario.read_s)
            free = await nightly(own)
            await asyncio.sleep(scenario.after_s)
        finally:
            done.set()
            sent = await sending
    trial = await examine(own, fleet, sent, scenario.limits)
    first, second = due_in(plan, sent, read.asked), due_in(plan, sent, free.asked)
    return _Nights(trial, read, free, first, second)


async def _while_somebody_reads(own: stack.Stack, at_least_s: float) -> Night:
    """A nightly run within one transaction of a reader of all days: a report that is being written, say."""
    conn = await own.connect()
    try:
        async with conn.transaction(isolation="repeatable_read", readonly=True):
            await conn.fetchval("SELECT count(*) FROM device_heartbeats")
            night, _ = await asyncio.gather(nightly(own), asyncio.sleep(at_least_s))
            return night
    finally:
        await conn.close(timeout=5)


async def _state(own: stack.Stack, old: date, made_again: list[date]) -> tuple[str, int]:
    """What became of the old day, and how many of the missing days are there."""
    conn = await own.connect()
    try:
        state: str = await conn.fetchval("SELECT state FROM hb_partitions WHERE partition_name = $1", name_of(old))
        return state, sum([await _is_attached(conn, day) for day in made_again])
    finally:
        await conn.close(timeout=5)


async def _is_attached(conn: asyncpg.Connection, day: date) -> bool:
    return bool(await conn.fetchval("SELECT relispartition FROM pg_class WHERE relname = $1", name_of(day)))


def _finding(scenario: ReaderScenario, nights: _Nights, old: str, state: str, there: int) -> Finding:
    finding = of_trial(scenario.name, scenario.title, nights.trial)
    reason = str(nights.read.answer.get("reason", ""))
    verdicts = (
        *finding.verdicts,
        hold(
            Limit(f"longest wait of a heartbeat, ms: lock_timeout is {LOCK_TIMEOUT_MS:,}", "", scenario.most_ms),
            nights.trial.result.max_ms,
        ),
        hold(Limit("with the reader: failed, and says why", "", 1, "at_least"), int(says_why(nights.read, old))),
        hold(Limit("with the reader gone: completed", "", 1, "at_least"), int(nights.free.completed)),
        hold(Limit("the old day is archived and dropped", "", 1, "at_least"), int(state == "dropped")),
        hold(Limit("missing days made", "", scenario.days_made, "at_least"), there),
    )
    figures = {
        "ingest with the reader": spread(nights.while_read),
        "ingest with the reader gone": spread(nights.while_free),
        "nightly with the reader": f"{nights.read.asked.seconds:.1f} s, answered {nights.read.status}: {reason}",
        "nightly with the reader gone": f"answered {nights.free.status}; {nights.free.timeline()}",
    }
    details = {
        **finding.details,
        "nightly": {"with_the_reader": dict(nights.read.answer), "with_the_reader_gone": dict(nights.free.answer)},
    }
    return Finding(finding.name, finding.title, verdicts, {**finding.figures, **figures}, details)


def says_why(night: Night, partition: str) -> bool:
    """Whether a run that failed names the day and who was in the way."""
    reason = str(night.answer.get("reason", ""))
    return night.status == 500 and night.answer.get("status") == "failed" and partition in reason and "pid " in reason
