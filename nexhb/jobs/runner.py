"""Runs a job: one at a time in the whole fleet of daemons, written down, and never half-known.

The lock lives on the job's own connection, on which all of its DDL runs: lose it, and the job stops.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import orjson

from nexhb import locks, log, metrics, numbers, sql
from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable, LockHeld, NexhbError
from nexhb.locks import Lock
from nexhb.pgerrors import FROM_THE_DATABASE, Kind, classify

_Q = sql.queries("jobs")
_log = log.get("jobs")

STATEMENT_TIMEOUT_S = 3600.0  # one statement of a job: the longest is the COPY of a day
LOCK_TIMEOUT_MS = 2_000
CLOCKS_DIFFER = timedelta(hours=1)  # no more than that between daemons that are in order

Counts = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """What a job did. With failures, the run failed, whatever else it did."""

    counts: Counts
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """Something that is run by one daemon at a time."""

    name: str
    lock: Lock
    events: str  # its events are EVENTS.started, .completed, .skipped, .failed
    work: Callable[[Connection, datetime], Awaitable[Done]]
    dry_run: bool = False  # reads only: no lock, no trace


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    job: str
    status: str  # completed | skipped | failed
    reason: str = ""
    counts: Mapping[str, Any] = field(default_factory=dict)
    elapsed_ms: int = 0

    def shown(self) -> dict[str, Any]:
        """As /ops/nightly answers it."""
        reason = {"reason": self.reason} if self.reason else {}
        return {"status": self.status, **reason, **self.counts, "elapsed_ms": self.elapsed_ms}


async def run(database: Database, job: Job, now: datetime, *, unless_since: datetime | None = None) -> Run:
    """Run `job` at `now` (UTC), or say why not: somebody else holds its lock, or it ran since `unless_since`.

    Raises DatabaseUnavailable where there is no database; whatever else goes wrong is in the Run.
    """
    connected = database.connected(
        application=f"nexhb {job.name}",
        command_timeout_s=STATEMENT_TIMEOUT_S,
        lock_timeout=f"{LOCK_TIMEOUT_MS}",
        # Should this host vanish, the server notices within a minute, and with the connection the lock is free.
        tcp_keepalives_idle="30",
        tcp_keepalives_interval="10",
        tcp_keepalives_count="3",
        jit="off",  # a chunk of the reconciliation costs just over the bound from which each would be compiled
    )
    try:
        async with connected as conn:
            return await _alone(database, conn, job, now, unless_since)
    except FROM_THE_DATABASE as error:
        if classify(error) is not Kind.LOST or isinstance(error, DatabaseUnavailable):
            raise
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error


async def _alone(database: Database, conn: Connection, job: Job, now: datetime, unless_since: datetime | None) -> Run:
    if job.dry_run:
        return await _work(conn, job, now)
    try:
        async with locks.held(conn, job.lock, wait=False):
            if unless_since and await _ran_since(conn, job, unless_since, now):
                return Run(job.name, "skipped", "already_ran")
            return await _written_down(database, conn, job, now)
    except LockHeld:
        if unless_since:  # the schedule looks again and again while another daemon's run is under way
            return Run(job.name, "skipped", "lock_held")
        await conn.execute(_Q["skipped"], job.name, now, "lock_held", socket.gethostname())
        return _ended(job, Run(job.name, "skipped", "lock_held"))


async def _ran_since(conn: Connection, job: Job, since: datetime, now: datetime) -> bool:
    last = await last_started(conn, job.name, now)
    return last is not None and last >= since


async def _written_down(database: Database, conn: Connection, job: Job, now: datetime) -> Run:
    await numbers.raise_sequences(conn)  # each run has a number; and no daemon may have started since they fell behind
    # We hold the lock, so whoever is still written down as running is dead.
    await conn.execute(_Q["bury"], job.name, now)
    run_no = await conn.fetchval(_Q["started"], job.name, now, socket.gethostname())
    _log.info(f"{job.events}.started", job=job.name, run_no=run_no)
    found = await _work(conn, job, now)
    ended = now + timedelta(milliseconds=found.elapsed_ms)
    values = (run_no, ended, found.status, found.reason or None, orjson.dumps(found.counts, default=str).decode())
    try:
        await conn.execute(_Q["ended"], *values)
    except Exception as error:
        # Not asked whether it is closed: one that is just being lost does not know it yet.
        if classify(error) is not Kind.LOST:
            raise
        async with database.connected(application=f"nexhb {job.name}") as other:
            await other.execute(_Q["ended"], *values)
    if found.status == "completed":
        metrics.job_last_success.labels(job=job.name).set(ended.timestamp())
    return _ended(job, found)


async def _work(conn: Connection, job: Job, now: datetime) -> Run:
    started = time.perf_counter()
    try:
        done = await job.work(conn, now)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        # What is foreseen says all in its sentence; a command would show its user a trace besides.
        _log.error("job.failed", job=job.name, error=reason, exc_info=None if isinstance(error, NexhbError) else error)
        done = Done({}, (reason,))
    elapsed_ms = round((time.perf_counter() - started) * 1000)
    status = "failed" if done.failures else "completed"
    return Run(job.name, status, "; ".join(done.failures), done.counts, elapsed_ms)


def _ended(job: Job, found: Run) -> Run:
    metrics.job_runs.labels(job=job.name, status=found.status).inc()
    if job.lock is Lock.RECONCILE:
        metrics.reconciliation_runs.labels(status=found.status).inc()
    if found.status != "skipped":
        metrics.job_duration.labels(job=job.name).set(found.elapsed_ms / 1000)
    say = _log.error if found.status == "failed" else _log.info
    say(f"{job.events}.{found.status}", job=job.name, **found.shown())
    return found


async def last_runs(
    conn: asyncpg.pool.PoolConnectionProxy | Connection, limit: int, before: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """The last `limit` runs of each job, newest first; with `before` (job → run_no) of those jobs and before those."""
    cursor = (None, None) if before is None else (list(before), list(before.values()))
    return [{**row, "counts": orjson.loads(row["counts"])} for row in await conn.fetch(_Q["last_runs"], limit, *cursor)]


async def last_started(conn: Connection, job: str, now: datetime) -> datetime | None:
    """When the job last began, whoever ran it; None where it never did. A run that its daemon did not live to end does
    not count, unless that is what it always comes to; nor one of a clock that was far ahead: nothing would be due until
    then."""
    found: datetime | None = await conn.fetchval(_Q["last_started"], job, now + CLOCKS_DIFFER)
    return found
