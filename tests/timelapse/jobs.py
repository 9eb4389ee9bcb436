"""The real jobs, run at the world's time, and what is expected of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.jobs import board, nightly, plan, runner
from nexhb.jobs.nightly import Means
from nexhb.jobs.plan import Day, Kind, Rules
from nexhb.jobs.runner import Run
from tests.timelapse import late
from tests.timelapse.database import NIGHTLY, gone
from tests.timelapse.fleet import WINDOW
from tests.timelapse.ledger import Broken
from tests.timelapse.world import World


class Killed(BaseException):
    """As by SIGKILL: no handler knows it."""


class Drills(random.Random):
    """Chance chooses this archive for the drill."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def choice(self, seq: Any) -> Any:
        """See random.Random."""
        return next(archived for archived in seq if archived.url == self._url)


async def run(
    world: World, rules: Rules, at: Callable[[str], None] = nightly.nothing, chance: random.Random | None = None
) -> Run:
    """One nightly run."""

    @asynccontextmanager
    async def store() -> AsyncIterator[Store]:
        yield world.store

    world.inactive_before = max(world.inactive_before, world.now - timedelta(days=rules.retention_days))
    # Who shortens the retention says that most of the days are to leave.
    yes = rules.retention_days < world.settings.retention_days
    means = Means(rules, store, world.spool, chance or random.Random(world.rng.random()), at, yes=yes)
    done = await runner.run(world.database, nightly.job(means), world.now)
    world.done.update({name: n for name, n in done.counts.items() if type(n) is int})
    return done


async def run_well(world: World, rules: Rules) -> Run:
    """One that must do all of its work."""
    return _expect(await run(world, rules), "completed")


async def run_badly(world: World, rules: Rules, chance: random.Random | None = None) -> Run:
    """One that must fail, and say why."""
    return _expect(await run(world, rules, chance=chance), "failed")


def _expect(done: Run, status: str) -> Run:
    if done.status != status or (status == "failed") != bool(done.reason):
        raise Broken(f"{done.job} was to be {status}, and is {done.status}: {done.reason}")
    return done


async def run_killed(world: World, rules: Rules, when: Callable[[str], bool]) -> bool:
    """One that is killed at the first durable point of which `when` says so; False where there was none."""
    conns: list[Connection] = []
    killed = False

    def connected(conn: Connection) -> None:
        if killed:  # in a COPY asyncpg has an error of its own for a dead connection; a dead process would not see it
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
    """PostgreSQL has noticed; and there lies what a killed process leaves."""
    await gone(world.conn, NIGHTLY)
    world.spool.mkdir(exist_ok=True)
    (world.spool / f"object-{world.now:%Y%m%d%H%M}").write_bytes(b"half of an object")
    await late.send_late(world)


async def reconcile(world: World) -> None:
    """One run of the reconciliation."""
    done = _expect(await runner.run(world.database, board.reconcile_job(), world.now), "completed")
    world.done["status rows healed"] += done.counts["updated"]


@dataclass(frozen=True)
class Sight:
    """What tonight's plan holds."""

    whole: bool  # an attached day is to be archived, and no detach is pending
    leaving: list[str]  # what is archived
    supplements: bool
    dropped: list[date]  # days that are in the archive only
    oldest: date  # attached
    young: list[date]  # days of the accept window that stay tonight, and are over


async def look(world: World, rules: Rules) -> Sight:
    """At tonight's plan."""
    days = await nightly.read_days(world.conn)
    steps = plan.nightly(days, world.now, rules)
    leaving = [step.day for step in steps if step.kind is Kind.ARCHIVE and step.day]
    waiting = [step.day for step in steps if step.kind is Kind.LATE and step.day]

    def is_young(day: Day) -> bool:
        return day.attached and day not in leaving and world.now - WINDOW < day.start and day.end < world.now

    return Sight(
        whole=any(day.attached for day in leaving) and not any(day.detach_pending for day in days),
        leaving=[day.name for day in leaving],
        supplements=any(not day.present for day in waiting),
        dropped=[day.start.date() for day in days if day.state == "dropped"],
        oldest=min((day.start.date() for day in days if day.attached and not day.restored), default=world.now.date()),
        young=[day.start.date() for day in days if is_young(day) and not day.restored],
    )
