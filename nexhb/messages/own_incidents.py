"""Incidents of nexhb itself that its database can record: a failed nightly run, a disk that is almost full. Routes with
`self = true` are told of them."""

from __future__ import annotations

from datetime import datetime

from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("messages")

_SEVERITIES = {"nightly_failed": "warning", "disk_low": "critical"}
MAX_DETAIL = 300


async def note(conn: Connection, now: datetime, disk: str) -> None:
    """Open an incident for each trouble that nexhb has now, and resolve those of the others. `disk`: why the disk is
    almost full, or an empty text."""
    troubles = {"disk_low": disk} if disk else {}
    if failure := await conn.fetchrow(_Q["nightly_failure"]):
        troubles["nightly_failed"] = str(failure["reason"] or "")
    async with conn.transaction():
        await conn.execute(_Q["resolve_own"], list(_SEVERITIES), list(troubles), now)
        if troubles:
            details = [detail[:MAX_DETAIL] for detail in troubles.values()]
            await conn.execute(_Q["open_own"], list(troubles), [_SEVERITIES[kind] for kind in troubles], details, now)
