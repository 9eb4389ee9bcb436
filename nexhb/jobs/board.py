"""The jobs that there are, made from the settings: what the schedule, the HTTP side and the command line call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from nexhb import sql
from nexhb.archive.store import open_store
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.jobs import nightly, plan, runner
from nexhb.jobs.backfill import Tell, backfill_job
from nexhb.jobs.nightly import Means
from nexhb.jobs.reconcile import reconcile
from nexhb.jobs.runner import Done, Job, Run
from nexhb.locks import Lock

_Q = sql.queries("jobs")

MAX_ROWS = 5_000  # repairs in one run of the reconciliation: half a second of writing, shared with ingest


def means(settings: Settings) -> Means:
    """What a nightly run works with, as the settings say."""
    return Means(
        rules=plan.Rules(
            retention_days=settings.partitions.retention_days,
            days_ahead=settings.partitions.days_ahead,
            accept_past=settings.ingest.accept_past,
        ),
        store=lambda: open_store(settings.archive_url, settings.archive),
        spool=settings.data_dir / "spool",
        bucket_seconds=settings.ingest.bucket_seconds,
        compare_clocks=True,
    )


def reconcile_job(max_rows: int = MAX_ROWS, *, dry_run: bool = False) -> Job:
    """The reconciliation: goes on where the last run stopped."""

    async def work(conn: Connection, now: datetime) -> Done:
        after = await conn.fetchval(_Q["next_device"]) or 0
        found = await reconcile(conn, now, max_rows=max_rows, after=after, dry_run=dry_run)
        return Done(
            ({"dry_run": True} if dry_run else {})
            | {
                "checked": found.checked,
                "wrong": found.wrong,
                "updated": found.updated,
                "next_device_no": found.next_device_no,
                "complete": found.complete,
            }
        )

    return Job("reconcile", Lock.RECONCILE, "reconciliation", work, dry_run=dry_run)


class Jobs:
    """The jobs of one daemon, or of one command."""

    def __init__(self, database: Database, settings: Settings, now: Callable[[], datetime]) -> None:
        self._database = database
        self._means = means(settings)
        self._now = now

    async def nightly(self, *, dry_run: bool = False, unless_since: datetime | None = None, **changes: Any) -> Run:
        """The nightly run, or its plan. Raises DatabaseUnavailable."""
        means = replace(self._means, **changes)
        job = nightly.dry_run(means) if dry_run else nightly.job(means)
        return await runner.run(self._database, job, self._now(), unless_since=unless_since)

    async def reconcile(
        self, *, max_rows: int = MAX_ROWS, dry_run: bool = False, unless_since: datetime | None = None
    ) -> Run:
        """The reconciliation. Raises DatabaseUnavailable."""
        job = reconcile_job(max_rows, dry_run=dry_run)
        return await runner.run(self._database, job, self._now(), unless_since=unless_since)

    async def backfill(self, days: int, tell: Tell) -> Run:
        """device_last_status filled from the history. Raises DatabaseUnavailable."""
        return await runner.run(self._database, backfill_job(days, tell), self._now())

    async def last_runs(self, limit: int, before: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """The last `limit` runs of each job, newest first; see runner.last_runs. Raises DatabaseUnavailable."""
        async with self._database.connected(application="nexhb jobs", command_timeout_s=10) as conn:
            return await runner.last_runs(conn, limit, before)
