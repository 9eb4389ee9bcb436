"""All checks of `nexhb doctor`, and how they are run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nexhb.config import Settings
from nexhb.doctor import database, days, fleet, jobs
from nexhb.doctor.check import Check, CheckContext, CheckResult
from nexhb.postgres.connections import Connection

# In the order of an investigation.
CHECKS: dict[str, Check] = {
    "database": database.durability,
    "clock": database.clocks,
    "schema": database.schema,
    "database copy": database.generations,
    "numbers": database.dangling_numbers,
    "days ahead": days.days_ahead,
    "detaches": days.pending_detaches,
    "archive": days.old_days,
    "archive store": days.archive_store,
    "late heartbeats": days.late_heartbeats,
    "nightly": jobs.job("nightly"),
    "reconcile": jobs.job("reconcile"),
    "restore drill": days.restore_drill,
    "drift": jobs.drift,
    "locks": database.held_locks,
    "HOT updates": database.hot_updates,
    "disk": days.disk_space,
    "flags": fleet.feature_flags,
    "shared tokens": fleet.shared_tokens,
    "NexMDM": fleet.nexmdm,
    "opening hours": fleet.opening_hours,
    "messages": fleet.messages,
    "offline after": fleet.offline_after,
}


async def run_checks(conn: Connection, settings: Settings, now: datetime) -> list[CheckResult]:
    """Run every check, in the order of the list. A check that raises has failed. `now` is in UTC."""
    context = CheckContext(conn, settings, now)
    results: list[CheckResult] = []
    for name, check in CHECKS.items():
        try:
            results.append(await check(context))
        except Exception as error:
            detail = f"the check failed: {error or type(error).__name__}"
            results.append(CheckResult(name, False, detail, "see the daemon's log"))
        if name == "schema" and not results[-1].passed:
            break  # the other checks read tables that another schema may lack
    return results


def as_json(results: list[CheckResult]) -> dict[str, Any]:
    """Return the results as `nexhb doctor --json` prints them."""
    return {
        "good": all(result.passed for result in results),
        "lines": [
            {"name": r.name, "good": r.passed, "said": r.detail, "remedy": "" if r.passed else r.remedy}
            for r in results
        ],
    }
