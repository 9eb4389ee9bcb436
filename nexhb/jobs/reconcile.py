"""Heals device_last_status from the history: rows that are missing, or older than the device's newest heartbeat.

A walk over the devices by number that the next run goes on with, so that none is ever out of reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from asyncpg import Record

from nexhb import metrics, sql
from nexhb.db import Connection

_Q = sql.queries("reconcile")

LOOKS_BACK = timedelta(hours=24)
LOOKS_AHEAD = timedelta(days=1)  # a heartbeat may carry a time ahead of ours, by ingest.accept_future
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Reconciled:
    """What a run found and did."""

    checked: int  # devices looked at
    wrong: int  # of those, rows missing, older than the history, or not saying that the device is revoked
    updated: int  # rows written: 0 in a dry run, fewer than wrong where the writer was there first
    next_device_no: int  # where the next run goes on: the last device looked at, 0 where it was the whole fleet
    complete: bool  # every device was looked at in this run


@dataclass(frozen=True)
class _Walk:
    """How far a run has come."""

    last: int  # the device looked at last
    checked: int = 0
    wrong: int = 0
    updated: int = 0

    def on(self, chunk: Record) -> _Walk:
        """With one more chunk."""
        return _Walk(
            chunk["last_device_no"],
            self.checked + chunk["checked"],
            self.wrong + chunk["wrong"],
            self.updated + chunk["updated"],
        )


@dataclass(frozen=True)
class _Run:
    """What stays the same from chunk to chunk."""

    conn: Connection
    now: datetime
    max_rows: int
    dry_run: bool
    chunk: int
    looks_back: timedelta = LOOKS_BACK
    tell: Callable[[int, int], None] | None = None  # hears, after each chunk: devices looked at, rows written

    async def walk(self, start: int, end: int, walk: _Walk) -> tuple[_Walk, bool]:
        """Look at the devices from behind `start` up to `end`; True where that was all of them, False where the
        repairs ran out before."""
        while (left := self._repairs_left(walk)) > 0:
            chunk = await self._heal(start, end, left)
            if not chunk["checked"]:
                return walk, True
            metrics.reconciliation_rows_updated.inc(chunk["updated"])  # committed, whatever becomes of the run
            walk = walk.on(chunk)
            start = walk.last
            if self.tell:
                self.tell(walk.checked, walk.updated)
        return walk, not await self.conn.fetchval(_Q["any_between"], start, end)

    def _repairs_left(self, walk: _Walk) -> int:
        # What the writer healed meanwhile was no repair of ours; a dry run counts those that it would make.
        return self.max_rows - (walk.wrong if self.dry_run else walk.updated)

    async def _heal(self, start: int, end: int, most: int) -> Record:
        since, until = self.now - self.looks_back, self.now + LOOKS_AHEAD
        row = await self.conn.fetchrow(_Q["heal"], start, end, self.chunk, since, until, most, not self.dry_run)
        assert row is not None  # noqa: S101 - an aggregate has one row
        return row


async def reconcile(
    conn: Connection, now: datetime, *, max_rows: int, after: int = 0, dry_run: bool = False, chunk: int = 5_000
) -> Reconciled:
    """Look at each device once, by device_no from behind `after` and round to it, until `max_rows` rows are repaired.

    What counts as history is the 24 h before `now` (and the day after it). Each `chunk` devices are one statement and
    one transaction: `conn` must not be in one. Raises what PostgreSQL says, a lock_timeout too; the chunks before it
    are committed then, and a repeated run finds them right.
    """
    run = _Run(conn, now, max_rows, dry_run, chunk)
    found = await _whole(run, after)
    metrics.reconciliation_drift.set(found.wrong / found.checked if found.checked else 0)
    return found


async def heal(
    conn: Connection, now: datetime, *, looks_back: timedelta, tell: Callable[[int, int], None], chunk: int = 1_000
) -> Reconciled:
    """The same for every device, however many are wrong, with a longer history; `tell` hears how far it is."""
    return await _whole(_Run(conn, now, _LARGEST, dry_run=False, chunk=chunk, looks_back=looks_back, tell=tell), 0)


async def _whole(run: _Run, after: int) -> Reconciled:
    walk, complete = await run.walk(after, _LARGEST, _Walk(after))
    if complete and after:
        walk, complete = await run.walk(0, after, walk)
    return Reconciled(walk.checked, walk.wrong, walk.updated, 0 if complete else walk.last, complete)
