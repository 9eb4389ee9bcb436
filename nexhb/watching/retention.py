"""Delete events, outages and incidents that are older than events.retention_days."""

from __future__ import annotations

from datetime import datetime

from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("watching")

ROWS = 10_000  # of one statement


async def prune(conn: Connection, before: datetime) -> int:
    """Delete what ended before this time. Return the number of rows that were deleted."""
    deleted = 0
    # Events and outages before incidents, to which they refer.
    for statement in (_Q["prune_changes"], _Q["prune_events"], _Q["prune_outages"], _Q["prune_incidents"]):
        while rows := await conn.fetchval(statement, before, ROWS):
            deleted += rows
    return deleted
