"""Repair device_last_status from the history: rows that are missing, or older than the device's newest heartbeat.

A run checks the devices in order of their numbers, and the next run continues where that run stopped, so that every
device is checked eventually.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from asyncpg import Record

from nexhb import metrics
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("reconcile")

HISTORY = timedelta(hours=24)
FUTURE = timedelta(days=1)  # a heartbeat's time may be later than the current time, by ingest.accept_future
_MAX_DEVICE_NO = 2**31 - 1


@dataclass(frozen=True)
class ReconcileResult:
    """The result of a run."""

    checked: int  # devices checked
    wrong: int  # checked devices whose row is missing, is older than the history, or lacks the revocation
    updated: int  # rows written: 0 in a dry run; fewer than `wrong` if the writer updated some rows first
    next_device_no: int  # the next run continues after this device: the last one checked, or 0 after the whole fleet
    complete: bool  # whether this run checked every device


@dataclass(frozen=True)
class _Progress:
    """The progress of a run."""

    last: int  # the last device checked
    checked: int = 0
    wrong: int = 0
    updated: int = 0

    def plus(self, chunk: Record) -> _Progress:
        """Return the progress after one more chunk."""
        return _Progress(
            chunk["last_device_no"],
            self.checked + chunk["checked"],
            self.wrong + chunk["wrong"],
            self.updated + chunk["updated"],
        )


@dataclass(frozen=True)
class _Run:
    """What all chunks of a run share."""

    conn: Connection
    now: datetime
    max_rows: int
    dry_run: bool
    chunk: int
    history: timedelta = HISTORY
    progress: Callable[[int, int], None] | None = None  # called after each chunk: devices checked, rows written

    async def check(self, start: int, end: int, so_far: _Progress) -> tuple[_Progress, bool]:
        """Check the devices after `start` up to and including `end`. Also return whether all of these were checked:
        False if the limit of repairs was reached first."""
        while (left := self._repairs_left(so_far)) > 0:
            chunk = await self._heal(start, end, left)
            if not chunk["checked"]:
                return so_far, True
            metrics.reconciliation_rows_updated.inc(chunk["updated"])  # committed, even if the run fails later
            so_far = so_far.plus(chunk)
            start = so_far.last
            if self.progress:
                self.progress(so_far.checked, so_far.updated)
        return so_far, not await self.conn.fetchval(_Q["any_between"], start, end)

    def _repairs_left(self, so_far: _Progress) -> int:
        # Rows that the writer corrected before this job do not count; a dry run counts the repairs that it would make.
        return self.max_rows - (so_far.wrong if self.dry_run else so_far.updated)

    async def _heal(self, start: int, end: int, max_repairs: int) -> Record:
        since, until = self.now - self.history, self.now + FUTURE
        row = await self.conn.fetchrow(_Q["heal"], start, end, self.chunk, since, until, max_repairs, not self.dry_run)
        assert row is not None  # noqa: S101 - an aggregate has one row
        return row


async def reconcile(
    conn: Connection, now: datetime, *, max_rows: int, after: int = 0, dry_run: bool = False, chunk: int = 5_000
) -> ReconcileResult:
    """Check each device once, in the order of device_no: those after `after`, then those up to `after`. Stop when
    `max_rows` rows are repaired.

    The history is the 24 h before `now` and the 24 h after it. Each `chunk` of devices is one statement and one
    transaction, so `conn` must not be in a transaction. Raises errors of PostgreSQL, including a lock timeout; the
    chunks before the error are committed, and a repeated run need not repair them.
    """
    run = _Run(conn, now, max_rows, dry_run, chunk)
    result = await _check_all(run, after)
    metrics.reconciliation_drift.set(result.wrong / result.checked if result.checked else 0)
    return result


async def heal(
    conn: Connection, now: datetime, *, history: timedelta, progress: Callable[[int, int], None], chunk: int = 1_000
) -> ReconcileResult:
    """Repair the rows of every device as `reconcile` does, but without a limit of repairs and with a longer history."""
    run = _Run(conn, now, _MAX_DEVICE_NO, dry_run=False, chunk=chunk, history=history, progress=progress)
    return await _check_all(run, 0)


async def _check_all(run: _Run, after: int) -> ReconcileResult:
    done, complete = await run.check(after, _MAX_DEVICE_NO, _Progress(after))
    if complete and after:
        done, complete = await run.check(0, after, done)
    return ReconcileResult(done.checked, done.wrong, done.updated, 0 if complete else done.last, complete)
