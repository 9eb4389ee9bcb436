"""Fill device_last_status from the history: after an import, or before reads are switched to it.

The backfill executes the statement of the reconciliation, with a longer history and no limit on the repairs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from nexhb.jobs.reconcile import heal
from nexhb.jobs.runner import Job, JobResult
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock

_Q = sql.queries("backfill")

MAX_DAYS = 90
ACTIVE_WITHIN = timedelta(hours=1)

Progress = Callable[[int, int, int], None]  # called with: devices checked, devices in total, rows written


def backfill_job(days: int, progress: Progress) -> Job:
    """Return the job that writes each device's newest heartbeat of `days` days, if the device's status is older."""

    async def work(conn: Connection, now: datetime) -> JobResult:
        devices = await conn.fetchval(_Q["devices"])
        result = await heal(
            conn,
            now,
            history=timedelta(days=days),
            progress=lambda checked, updated: progress(checked, devices, updated),
        )
        row = await conn.fetchrow(_Q["fleet"], now - ACTIVE_WITHIN)
        assert row is not None  # noqa: S101 - an aggregate has one row
        return JobResult({"days": days, "checked": result.checked, "updated": result.updated, **row})

    return Job("backfill", Lock.BACKFILL, "backfill", work)
