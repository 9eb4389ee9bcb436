"""The schedule of the daemon's jobs.

Whether a job is due follows from job_runs. So a run that was missed while no daemon ran is made up for, and a run that
another daemon made is not repeated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from croniter import croniter

from nexhb import log, metrics, partitions
from nexhb.config import JobsSettings
from nexhb.jobs import runner
from nexhb.jobs.registry import Jobs
from nexhb.jobs.runner import JobRun
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.watching import counts

_Q = sql.queries("jobs")
_log = log.get("jobs")

CHECK_INTERVAL_S = 15.0  # seconds between two checks of whether a job is due


@dataclass(frozen=True)
class _Scheduled:
    name: str
    cron: str
    run: Callable[..., Awaitable[JobRun]]


def due_since(cron: str, now: datetime, last_started: datetime | None) -> datetime | None:
    """Return the last time at which the job was scheduled, or None if the job has started since then. Times are UTC."""
    last: datetime = croniter(cron, now).get_prev(datetime)
    return last if last_started is None or last_started < last else None


class Schedule:
    """Runs jobs when they are due."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        settings: JobsSettings,
        now: Callable[[], datetime],
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._now = now
        self._jitter_s = settings.jitter_seconds
        self._random_fraction = random_fraction
        jobs_and_crons = (
            _Scheduled("nightly", settings.nightly, jobs.nightly),
            _Scheduled("reconcile", settings.reconcile, jobs.reconcile),
        )
        self._scheduled = [job for job in jobs_and_crons if job.cron]

    async def run(self) -> None:
        """Run due jobs until cancelled. Different jobs may run at the same time."""
        async with asyncio.TaskGroup() as group:
            for job in self._scheduled:
                group.create_task(self._run_when_due(job), name=job.name)
            group.create_task(self._keep_metrics_current(), name="job metrics")

    async def _run_when_due(self, job: _Scheduled) -> None:
        while True:
            await asyncio.sleep(self._jitter_s * self._random_fraction())
            try:
                if due := await self._due(job):
                    await job.run(unless_since=due)
            except Exception:
                # Failures of the job are in job_runs. This error comes from the database, and the next check is soon.
                _log.exception("job.not_run", job=job.name)
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def _due(self, job: _Scheduled) -> datetime | None:
        async with self._database.connected(application="nexhb schedule", command_timeout_s=10) as conn:
            now = self._now()
            return due_since(job.cron, now, await runner.last_started(conn, job.name, now))

    async def _keep_metrics_current(self) -> None:
        """Update the metrics from the database: the last run may have been made by another daemon or by a command."""
        while True:
            try:
                async with self._database.connected(application="nexhb schedule", command_timeout_s=10) as conn:
                    await update_metrics(conn, self._now())
                    await counts.update_metrics(conn)
            except Exception:
                _log.exception("job.metrics_not_read")
            await asyncio.sleep(60)


async def update_metrics(conn: Connection, now: datetime) -> None:
    """Set the metrics that describe the database, which are the same in every daemon."""
    last_success = {
        row["job"]: row["at"] for row in await conn.fetch(_Q["last_success"], now + runner.MAX_CLOCK_DIFFERENCE)
    }
    for job in ("nightly", "reconcile"):
        last_success.setdefault(job, None)
    for job, at in last_success.items():
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
