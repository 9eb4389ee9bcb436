"""Run nexhb's jobs at the simulated time, and check their results."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from nexhb.archive.store import Store
from nexhb.jobs import known_days, nightly, plan, registry, runner
from nexhb.jobs.nightly import NightlyContext
from nexhb.jobs.plan import Day, NightlyRules, StepKind
from nexhb.jobs.runner import JobRun
from nexhb.postgres.connections import Connection
from tests.timelapse import late
from tests.timelapse.database import NIGHTLY, wait_until_gone
from tests.timelapse.fleet import WINDOW
from tests.timelapse.ledger import BrokenPromise
from tests.timelapse.world import World


class Killed(BaseException):
    """The exception that stands for SIGKILL: no handler catches it."""


class DrillOf(random.Random):
    """A random choice that always selects this archive for the drill (the nightly test restore)."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def choice(self, seq: Any) -> Any:
        """Return the archive with the URL."""
        return next(archived for archived in seq if archived.url == self._url)


async def run(
    world: World,
    rules: NightlyRules,
    at: Callable[[str], None] = nightly.no_checkpoint,
    chance: random.Random | None = None,
) -> JobRun:
    """Run the nightly job."""

    @asynccontextmanager
    async def store() -> AsyncIterator[Store]:
        yield world.store

    world.inactive_before = max(world.inactive_before, world.now - timedelta(days=rules.retention_days))
    # An operator who shortens the retention confirms that most of the days may be archived.
    confirmed = rules.retention_days < world.settings.retention_days
    context = NightlyContext(
        rules, store, world.spool, chance or random.Random(world.rng.random()), at, confirmed=confirmed
    )
    done = await runner.run(world.database, nightly.nightly_job(context), world.now)
    world.done.update({name: n for name, n in done.counts.items() if type(n) is int})
    return done


async def run_successfully(world: World, rules: NightlyRules) -> JobRun:
    """Run the nightly job, which must succeed."""
    return _expect(await run(world, rules), "completed")


async def run_failing(world: World, rules: NightlyRules, chance: random.Random | None = None) -> JobRun:
    """Run the nightly job, which must fail with a reason."""
    return _expect(await run(world, rules, chance=chance), "failed")


def _expect(done: JobRun, status: str) -> JobRun:
    if done.status != status or (status == "failed") != bool(done.reason):
        raise BrokenPromise(f"{done.job} should be {status}, but is {done.status}: {done.reason}")
    return done


async def run_killed(world: World, rules: NightlyRules, when: Callable[[str], bool]) -> bool:
    """Run the nightly job and kill it at the first checkpoint that `when` accepts. Return False if there was none."""
    conns: list[Connection] = []
    killed = False

    def connected(conn: Connection) -> None:
        # If the kill was during a COPY, asyncpg raises its own error instead of Killed, and the run may try to connect
        # again. A killed process could not do so.
        if killed:
            conn.terminate()
            raise Killed
        conns.append(conn)

    def at(point: str) -> None:
        nonlocal killed
        if when(point):
            killed = True
            conns[-1].terminate()
            raise Killed

    world.database.watchers[NIGHTLY] = connected
    try:
        done = await run(world, rules, at)
    except Killed:
        await after_kill(world)
        return True
    finally:
        del world.database.watchers[NIGHTLY]
    _expect(done, "completed")
    return False


async def after_kill(world: World) -> None:
    """Wait until PostgreSQL has noticed the kill, and leave the files that a killed process would leave."""
    await wait_until_gone(world.conn, NIGHTLY)
    world.spool.mkdir(exist_ok=True)
    (world.spool / f"object-{world.now:%Y%m%d%H%M}").write_bytes(b"half of an object")
    await late.send_late(world)


async def reconcile(world: World) -> None:
    """Run the reconciliation."""
    done = _expect(await runner.run(world.database, registry.reconcile_job(), world.now), "completed")
    world.done["status rows repaired"] += done.counts["updated"]


@dataclass(frozen=True)
class TonightsPlan:
    """The properties of tonight's plan that determine which faults are possible."""

    has_attached_day: bool  # whether an attached day is to be archived and no detach is pending
    days_to_archive: list[str]
    has_supplements: bool  # whether late heartbeats of an archived day are to be archived
    dropped_days: list[date]  # days that are only in the archive
    oldest_day: date  # the oldest attached day
    recent_days: list[date]  # past days within ingest.accept_past that are kept tonight


async def read_plan(world: World, rules: NightlyRules) -> TonightsPlan:
    """Read tonight's plan."""
    days = await known_days.read_days(world.conn)
    steps = plan.nightly(days, world.now, rules)
    to_archive = [step.day for step in steps if step.kind is StepKind.ARCHIVE and step.day]
    with_late = [step.day for step in steps if step.kind is StepKind.LATE and step.day]

    def is_recent(day: Day) -> bool:
        return day.attached and day not in to_archive and world.now - WINDOW < day.start and day.end < world.now

    return TonightsPlan(
        has_attached_day=any(day.attached for day in to_archive) and not any(day.detach_pending for day in days),
        days_to_archive=[day.name for day in to_archive],
        has_supplements=any(not day.present for day in with_late),
        dropped_days=[day.start.date() for day in days if day.state == "dropped"],
        oldest_day=min(
            (day.start.date() for day in days if day.attached and not day.restored), default=world.now.date()
        ),
        recent_days=[day.start.date() for day in days if is_recent(day) and not day.restored],
    )
