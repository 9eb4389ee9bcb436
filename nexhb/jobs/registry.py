"""The jobs, built from the settings, as the schedule, the HTTP handlers and the commands start them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from nexhb.archive.opening import open_store
from nexhb.config import Settings
from nexhb.jobs import nightly, plan, runner
from nexhb.jobs.backfill import Progress, backfill_job
from nexhb.jobs.nightly import NightlyContext
from nexhb.jobs.reconcile import reconcile
from nexhb.jobs.runner import Job, JobResult, JobRun
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from nexhb.watching.device_days import UptimeRules

_Q = sql.queries("jobs")

MAX_ROWS = 5_000  # maximum number of repairs in one run: half a second of writes, which compete with ingest


def uptime_rules(settings: Settings) -> UptimeRules:
    """Return the rules of uptimes according to the settings."""
    return UptimeRules(
        settings.heartbeat.interval_seconds, settings.heartbeat.offline_after_seconds, settings.uptime.retention_days
    )


def nightly_context(settings: Settings) -> NightlyContext:
    """Return the context of a nightly run according to the settings."""
    return NightlyContext(
        rules=plan.NightlyRules(
            retention_days=settings.partitions.retention_days,
            days_ahead=settings.partitions.days_ahead,
            accept_past=settings.ingest.accept_past,
        ),
        store=lambda: open_store(settings.archive_url, settings.archive),
        spool=settings.data_dir / "spool",
        bucket_seconds=settings.ingest.bucket_seconds,
        events_kept=timedelta(days=settings.events.retention_days),
        uptime=uptime_rules(settings),
        compare_clocks=True,
    )


def reconcile_job(max_rows: int = MAX_ROWS, *, dry_run: bool = False) -> Job:
    """Return the reconciliation job, which continues after the device where the last run stopped."""

    async def work(conn: Connection, now: datetime) -> JobResult:
        after = await conn.fetchval(_Q["next_device"]) or 0
        result = await reconcile(conn, now, max_rows=max_rows, after=after, dry_run=dry_run)
        return JobResult(
            ({"dry_run": True} if dry_run else {})
            | {
                "checked": result.checked,
                "wrong": result.wrong,
                "updated": result.updated,
                "next_device_no": result.next_device_no,
                "complete": result.complete,
            }
        )

    return Job("reconcile", Lock.RECONCILE, "reconciliation", work, dry_run=dry_run)


class Jobs:
    """The jobs of one daemon or command."""

    def __init__(self, database: Database, settings: Settings, now: Callable[[], datetime]) -> None:
        self._database = database
        self._context = nightly_context(settings)
        self._now = now

    async def nightly(self, *, dry_run: bool = False, unless_since: datetime | None = None, **changes: Any) -> JobRun:
        """Run the nightly job, or only plan it. Raises DatabaseUnavailable."""
        context = replace(self._context, **changes)
        job = nightly.dry_run_job(context) if dry_run else nightly.nightly_job(context)
        return await runner.run(self._database, job, self._now(), unless_since=unless_since)

    async def reconcile(
        self, *, max_rows: int = MAX_ROWS, dry_run: bool = False, unless_since: datetime | None = None
    ) -> JobRun:
        """Run the reconciliation. Raises DatabaseUnavailable."""
        job = reconcile_job(max_rows, dry_run=dry_run)
        return await runner.run(self._database, job, self._now(), unless_since=unless_since)

    async def backfill(self, days: int, progress: Progress) -> JobRun:
        """Fill device_last_status from the history. Raises DatabaseUnavailable."""
        return await runner.run(self._database, backfill_job(days, progress), self._now())

    async def last_runs(self, limit: int, before: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """Return the last `limit` runs of each job, newest first (see runner.last_runs). Raises DatabaseUnavailable."""
        async with self._database.connected(application="nexhb jobs", command_timeout_s=10) as conn:
            return await runner.last_runs(conn, limit, before)
