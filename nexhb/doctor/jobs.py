"""Checks of the scheduled jobs: whether they run, and what they had to repair."""

from __future__ import annotations

import textwrap
from datetime import timedelta

from asyncpg import Record

from nexhb.doctor.check import Check, CheckContext, CheckResult, shown_time
from nexhb.jobs import schedule
from nexhb.jobs.runner import MAX_CLOCK_DIFFERENCE
from nexhb.postgres import sql

_Q = sql.queries("doctor")

FIRST_RUN_WITHIN = timedelta(minutes=2)  # from the first start; plus jobs.jitter_seconds, after which both jobs are due
MAX_DRIFT = 0.01
MAX_REASON = 240  # characters; `GET /ops/jobs` has the full text


def job(name: str) -> Check:
    """Return a check that the job runs on schedule and succeeds."""

    async def check(context: CheckContext) -> CheckResult:
        cron: str = getattr(context.settings.jobs, name)
        row = await context.conn.fetchrow(_Q["last_good"], name, context.now + MAX_CLOCK_DIFFERENCE)
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        if not cron:
            return CheckResult(
                name,
                row["good"] is not None,
                f"no schedule; last successful run: {shown_time(row['good'])}",
                f"nexhb {name}",
            )
        if _first_is_due(context, row):
            return CheckResult(name, True, "no run yet: the first run starts within minutes of the first start")
        # The run that is due now may still be under way, so the one before it must have succeeded.
        before = schedule.due_since(cron, context.now - timedelta(hours=1), row["good"])
        failure = f"; the last run failed: {textwrap.shorten(row['reason'], MAX_REASON)}" if row["reason"] else ""
        return CheckResult(
            name, before is None, f"last successful run: {shown_time(row['good'])}{failure}", f"nexhb {name}"
        )

    return check


def _first_is_due(context: CheckContext, row: Record) -> bool:
    """Return whether no run has ended yet, and the schema is too new for the first run to be overdue."""
    deadline = FIRST_RUN_WITHIN + timedelta(seconds=context.settings.jobs.jitter_seconds)
    return row["good"] is None and row["reason"] is None and abs(context.now - row["schema_made"]) < deadline


async def drift(context: CheckContext) -> CheckResult:
    """Check that the last reconciliation had little to repair."""
    row = await context.conn.fetchrow(_Q["drift"])
    if row is None or not row["checked"]:
        return CheckResult("drift", True, "no reconciliation has run yet")
    good = row["wrong"] / row["checked"] <= MAX_DRIFT
    return CheckResult(
        "drift", good, f"{row['wrong']} of {row['checked']} rows were wrong", "nexhb reconcile, until no row is wrong"
    )
