"""Fills device_last_status from the history: after an import, or before reads are turned over to it.

The reconciliation's own statement, with a longer look back and no bound of repairs.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from nexhb import sql
from nexhb.db import Connection
from nexhb.jobs.reconcile import heal
from nexhb.jobs.runner import Done, Job
from nexhb.locks import Lock

_Q = sql.queries("backfill")

DAYS_MOST = 90
ACTIVE_WITHIN = timedelta(hours=1)

Tell = Callable[[int, int, int], None]  # devices looked at, of how many, rows written


def backfill_job(days: int, tell: Tell) -> Job:
    """The newest heartbeat of each device within `days` days, where it is newer than what stands there."""

    async def work(conn: Connection, now: datetime) -> Done:
        devices = await conn.fetchval(_Q["devices"])
        found = await heal(
            conn, now, looks_back=timedelta(days=days), tell=lambda checked, wrote: tell(checked, devices, wrote)
        )
        row = await conn.fetchrow(_Q["fleet"], now - ACTIVE_WITHIN)
        assert row is not None  # noqa: S101 - an aggregate has one row
        return Done({"days": days, "checked": found.checked, "updated": found.updated, **row})

    return Job("backfill", Lock.BACKFILL, "backfill", work)
