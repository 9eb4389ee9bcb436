"""What a transaction adds to the ledger: heartbeats written and deduplicated, by day. Pure."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from nexhb.heartbeat import Heartbeat, Key
from nexhb.ingest import batch
from nexhb.ingest.batch import Plan


def counts(heartbeats: Sequence[Heartbeat], plan: Plan, written: Set[Key]) -> tuple[Sequence[Any], ...]:
    """Return what a transaction adds to the ledger as day[], written[], deduplicated[]. `written`: the keys that became
    rows."""
    received = {day: len(rows) for day, rows in plan.rows.items()}
    if len(written) == sum(received.values()):  # the usual case: every planned row was written
        became_rows = dict(received)
    else:
        became_rows = {day: sum(key in written for key, _ in rows) for day, rows in plan.rows.items()}
    for index in plan.duplicates:
        day = batch.day_of(heartbeats[index])
        received[day] = received.get(day, 0) + 1
    days = sorted(received)
    rows = [became_rows.get(day, 0) for day in days]
    return days, rows, [received[day] - count for day, count in zip(days, rows, strict=True)]


def correction(plan: Plan, written: Set[Key]) -> tuple[Sequence[Any], ...]:
    """Return what to add to the ledger as day[], written[], deduplicated[], because `counts` counted every planned row
    as new.
    """
    days = list(plan.rows)
    duplicates = [sum(key not in written for key, _ in plan.rows[day]) for day in days]
    return days, [-count for count in duplicates], duplicates
