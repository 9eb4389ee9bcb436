"""Run a job: by one daemon at a time, with its start and its result recorded in job_runs.

The connection that holds the lock also executes all DDL of the job: if the connection is lost, the job stops.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import orjson

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable, LockHeld, NexhbError, described
from nexhb.postgres import locks, numbers, sql
from nexhb.postgres.connections import AnyConnection, Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE, Kind, classify
from nexhb.postgres.locks import Lock

_Q = sql.queries("jobs")
_log = log.get("jobs")

STATEMENT_TIMEOUT_S = 3600.0  # the longest statement of a job is the COPY of a day
LOCK_TIMEOUT_MS = 2_000
MAX_CLOCK_DIFFERENCE = timedelta(hours=1)  # a larger difference between two clocks means that one is wrong

Counts = dict[str, Any]


@dataclass(frozen=True)
class JobResult:
    """What a job did. The run as a whole failed if `failures` is not empty."""

    counts: Counts
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A job that one daemon at a time may run."""

    name: str
    lock: Lock
    events: str  # the prefix of the log events, before .started, .completed, .skipped, .failed
    work: Callable[[Connection, datetime], Awaitable[JobResult]]
    dry_run: bool = False  # the job only reads: it needs no lock, and the run is not recorded


@dataclass(frozen=True)
class JobRun:
    """How a run ended."""

    job: str
    status: str  # completed | skipped | failed
    reason: str = ""
    counts: Mapping[str, Any] = field(default_factory=dict)
    elapsed_ms: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the body of the response to POST /ops/nightly and POST /ops/reconcile."""
        reason = {"reason": self.reason} if self.reason else {}
        return {"status": self.status, **reason, **self.counts, "elapsed_ms": self.elapsed_ms}


async def run(database: Database, job: Job, now: datetime, *, unless_since: datetime | None = None) -> JobRun:
    """Run `job` at `now` (UTC), unless another process holds the job's lock, or the job has run since `unless_since`.

    Raises DatabaseUnavailable if the database cannot be reached; any other error is in the JobRun.
    """
    connected = database.connected(
        application=f"nexhb {job.name}",
        command_timeout_s=STATEMENT_TIMEOUT_S,
        lock_timeout=f"{LOCK_TIMEOUT_MS}",
        # If this host vanishes, the server closes the connection within a minute, which releases the lock.
        tcp_keepalives_idle="30",
        tcp_keepalives_interval="10",
        tcp_keepalives_count="3",
        jit="off",  # otherwise each query of a reconciliation would be compiled: its cost is just above the limit
    )
    try:
        async with connected as conn:
            return await _run_exclusively(database, conn, job, now, unless_since)
    except FROM_THE_DATABASE as error:
        if classify(error) is not Kind.LOST or isinstance(error, DatabaseUnavailable):
            raise
        raise DatabaseUnavailable(described(error)) from error


async def _run_exclusively(
    database: Database, conn: Connection, job: Job, now: datetime, unless_since: datetime | None
) -> JobRun:
    if job.dry_run:
        return await _execute(conn, job, now)
    try:
        async with locks.held(conn, job.lock, wait=False):
            if unless_since and await _ran_since(conn, job, unless_since, now):
                return JobRun(job.name, "skipped", "already_ran")
            return await _run_recorded(database, conn, job, now)
    except LockHeld:
        if unless_since:  # not recorded: the schedule tries every few seconds while another daemon runs the job
            return JobRun(job.name, "skipped", "lock_held")
        await conn.execute(_Q["skipped"], job.name, now, "lock_held", socket.gethostname())
        return _report(job, JobRun(job.name, "skipped", "lock_held"))


async def _ran_since(conn: Connection, job: Job, since: datetime, now: datetime) -> bool:
    last = await last_started(conn, job.name, now)
    return last is not None and last >= since


async def _run_recorded(database: Database, conn: Connection, job: Job, now: datetime) -> JobRun:
    # The run needs a number from a sequence. If the sequences fell behind, possibly no daemon has started since to
    # raise them.
    await numbers.raise_sequences(conn)
    # This process holds the lock, so a run that is still recorded as running was interrupted.
    await conn.execute(_Q["fail_interrupted"], job.name, now)
    run_no = await conn.fetchval(_Q["started"], job.name, now, socket.gethostname())
    _log.info(f"{job.events}.started", job=job.name, run_no=run_no)
    ended = await _execute(conn, job, now)
    ended_at = now + timedelta(milliseconds=ended.elapsed_ms)
    counts = orjson.dumps(ended.counts, default=str).decode()
    values = (run_no, ended_at, ended.status, ended.reason or None, counts)
    try:
        await conn.execute(_Q["ended"], *values)
    except Exception as error:
        # conn.is_closed() would not suffice: it may be false while the connection is just being lost.
        if classify(error) is not Kind.LOST:
            raise
        async with database.connected(application=f"nexhb {job.name}") as another:
            await another.execute(_Q["ended"], *values)
    if ended.status == "completed":
        metrics.job_last_success.labels(job=job.name).set(ended_at.timestamp())
    return _report(job, ended)


async def _execute(conn: Connection, job: Job, now: datetime) -> JobRun:
    started = time.perf_counter()
    try:
        result = await job.work(conn, now)
    except Exception as error:
        reason = described(error)
        # The message of an expected error is sufficient; with a trace, a command would print the trace to its user.
        _log.error("job.failed", job=job.name, error=reason, exc_info=None if isinstance(error, NexhbError) else error)
        result = JobResult({}, (reason,))
    elapsed_ms = round((time.perf_counter() - started) * 1000)
    status = "failed" if result.failures else "completed"
    return JobRun(job.name, status, "; ".join(result.failures), result.counts, elapsed_ms)


def _report(job: Job, ended: JobRun) -> JobRun:
    metrics.job_runs.labels(job=job.name, status=ended.status).inc()
    if job.lock is Lock.RECONCILE:
        metrics.reconciliation_runs.labels(status=ended.status).inc()
    if ended.status != "skipped":
        metrics.job_duration.labels(job=job.name).set(ended.elapsed_ms / 1000)
    log_event = _log.error if ended.status == "failed" else _log.info
    log_event(f"{job.events}.{ended.status}", job=job.name, **ended.as_dict())
    return ended


async def last_runs(conn: AnyConnection, limit: int, before: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Return the last `limit` runs of each job, newest first. With `before` (job → run_no), return only runs of
    these jobs with lower numbers."""
    cursor = (None, None) if before is None else (list(before), list(before.values()))
    return [{**row, "counts": orjson.loads(row["counts"])} for row in await conn.fetch(_Q["last_runs"], limit, *cursor)]


async def last_started(conn: Connection, job: str, now: datetime) -> datetime | None:
    """Return when any process last started the job; None if no process has started it.

    A run whose daemon was killed does not count, unless that happened three times within half a day. A run that was
    started by a clock far ahead does not count either: otherwise no run would be due until that time.
    """
    started_at: datetime | None = await conn.fetchval(_Q["last_started"], job, now + MAX_CLOCK_DIFFERENCE)
    return started_at
