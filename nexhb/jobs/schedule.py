"""When the daemon runs its jobs. What is due is read from job_runs, so a run that was missed while no daemon was there
is made up, and one that another daemon made is not made again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from croniter import croniter

from nexhb import log, metrics, partitions, sql
from nexhb.config import Jobs as Settings
from nexhb.db import Connection, Database
from nexhb.jobs import runner
from nexhb.jobs.board import Jobs
from nexhb.jobs.runner import Run

_Q = sql.queries("jobs")
_log = log.get("jobs")

LOOK_S = 15.0  # how often it is looked whether something is due


@dataclass(frozen=True)
class _Scheduled:
    name: str
    cron: str
    run: Callable[..., Awaitable[Run]]


def due_since(cron: str, now: datetime, last_started: datetime | None) -> datetime | None:
    """The last time at which the job should have begun, if it has not begun since; else None. Times in UTC."""
    last: datetime = croniter(cron, now).get_prev(datetime)
    return last if last_started is None or last_started < last else None


class Schedule:
    """The coroutine that runs what is due."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        settings: Settings,
        now: Callable[[], datetime],
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._now = now
        self._jitter_s = settings.jitter_seconds
        self._random_fraction = random_fraction
        wanted = (
            _Scheduled("nightly", settings.nightly, jobs.nightly),
            _Scheduled("reconcile", settings.reconcile, jobs.reconcile),
        )
        self._scheduled = [one for one in wanted if one.cron]

    async def run(self) -> None:
        """Run what is due, each job beside the others, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one in self._scheduled:
                group.create_task(self._keep(one), name=one.name)
            group.create_task(self._keep_metrics(), name="job metrics")

    async def _keep(self, one: _Scheduled) -> None:
        while True:
            await asyncio.sleep(self._jitter_s * self._random_fraction())
            try:
                if due := await self._due(one):
                    await one.run(unless_since=due)
            except Exception:
                # The job's own failures are in job_runs; this is the database's absence, and the next look is soon.
                _log.exception("job.not_run", job=one.name)
            await asyncio.sleep(LOOK_S)

    async def _due(self, one: _Scheduled) -> datetime | None:
        async with self._database.connected(application="nexhb schedule", command_timeout_s=10) as conn:
            now = self._now()
            return due_since(one.cron, now, await runner.last_started(conn, one.name, now))

    async def _keep_metrics(self) -> None:
        """What the database says counts, whichever daemon or command did it: one's own last run may be an old story."""
        while True:
            try:
                async with self._database.connected(application="nexhb schedule", command_timeout_s=10) as conn:
                    await show(conn, self._now())
            except Exception:
                _log.exception("job.metrics_not_read")
            await asyncio.sleep(60)


async def show(conn: Connection, now: datetime) -> None:
    """Set the metrics that speak of the database and not of this daemon."""
    last_good = {row["job"]: row["at"] for row in await conn.fetch(_Q["last_good"], now + runner.CLOCKS_DIFFER)}
    for job in ("nightly", "reconcile"):
        last_good.setdefault(job, None)
    for job, at in last_good.items():
        if job == "drill" and at is None:
            continue
        gauge = metrics.last_drill if job == "drill" else metrics.job_last_success.labels(job=job)
        gauge.set(at.timestamp() if at else 0)
    states = {row["state"]: row["days"] for row in await conn.fetch(_Q["states"])}
    for state in ("active", "archived", "archive_failed", "dropped"):
        metrics.partitions.labels(state=state).set(states.get(state, 0))
    metrics.days_ahead.set(await partitions.days_ahead(conn, now.date()))
    if (drift := await conn.fetchval(_Q["drift"])) is not None:
        metrics.reconciliation_drift.set(drift)
