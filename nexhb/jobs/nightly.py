"""The nightly run: carry out the plan step by step.

Each step may be killed at any point and repeated. If a step fails, the run counts as failed, but only the steps that
depend on it are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from nexhb import clock, log, metrics, partitions, retirement
from nexhb.archive import catalog, late, marker, restore, verify
from nexhb.archive.export import BUCKET_SECONDS, ArchivedTable, clean_spool, export
from nexhb.archive.store import Store
from nexhb.errors import JobFailed, LockLost, NexhbError
from nexhb.jobs import plan
from nexhb.jobs.known_days import read_days, with_uptime_due
from nexhb.jobs.plan import Day, Step, StepKind
from nexhb.jobs.runner import MAX_CLOCK_DIFFERENCE, Job, JobResult
from nexhb.postgres import locks, sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock
from nexhb.watching import device_days, months, retention
from nexhb.watching.device_days import DayTable, UptimeRules

_P = sql.queries("partitions")
_Q = sql.queries("jobs")
_log = log.get("jobs")

RUNS_KEPT = timedelta(days=366)
CONFIRM_HINT = "Set the clock. If the clock is right: `nexhb nightly --yes`, or POST /ops/nightly?yes=true."
COMPARISONS_KEPT = timedelta(days=8)  # how long to keep perf_diff's comparisons; a rollout's last report covers a week


def no_checkpoint(_point: str) -> None:
    """Do nothing at a checkpoint."""


@dataclass(frozen=True)
class NightlyContext:
    """The settings and resources of a nightly run."""

    rules: plan.NightlyRules
    store: Callable[[], AbstractAsyncContextManager[Store]]
    spool: Path  # a folder for objects before they are stored
    random: random.Random = field(default_factory=random.SystemRandom)  # chooses the archive to restore as a trial
    checkpoint: Callable[[str], None] = no_checkpoint  # called after each durable step; tests kill a run there
    bucket_seconds: int = BUCKET_SECONDS  # bucket length of most rows of the archived days
    events_kept: timedelta = timedelta(days=400)
    uptime: UptimeRules = field(default_factory=UptimeRules)
    compare_clocks: bool = False  # fail if this machine's clock differs from the database's
    # The operator confirmed an unusual plan: that most of the days may be archived and dropped, or the clock is right.
    confirmed: bool = False


def nightly_job(context: NightlyContext) -> Job:
    """Return the job of the nightly run."""

    async def work(conn: Connection, now: datetime) -> JobResult:
        if context.compare_clocks:
            await _compare_clocks(conn, now)
        async with context.store() as store:
            return await NightlyRun(conn, store, context, now).run()

    return Job("nightly", Lock.NIGHTLY, "nightly_maintenance", work)


async def _compare_clocks(conn: Connection, now: datetime) -> None:
    """Raise JobFailed if the two clocks differ: by a clock that is far ahead, a run would drop days that still get
    heartbeats."""
    database_now = (await clock.read(conn))[0]
    if abs(now - database_now) > MAX_CLOCK_DIFFERENCE:
        raise JobFailed(
            f"It is {now:%Y-%m-%d %H:%MZ} here and {database_now:%Y-%m-%d %H:%MZ} in the database: set the clocks."
        )


def dry_run_job(context: NightlyContext) -> Job:
    """Return the job that only lists the steps of a nightly run."""

    async def work(conn: Connection, now: datetime) -> JobResult:
        steps, confirm_reason = await _make_plan(conn, now, context)
        listed = [{"step": s.kind, "target": s.target, "reason": s.reason} for s in steps]
        return JobResult(
            {"dry_run": True, "plan": listed} | ({"asks": f"{confirm_reason} {CONFIRM_HINT}"} if confirm_reason else {})
        )

    return Job("nightly", Lock.NIGHTLY, "nightly_maintenance", work, dry_run=True)


async def _make_plan(conn: Connection, now: datetime, context: NightlyContext) -> tuple[list[Step], str | None]:
    """Return the steps, and the reason why an operator must confirm the steps; None if no confirmation is required."""
    days = await with_uptime_due(conn, await read_days(conn, now), now)
    steps = plan.nightly(days, now, context.rules)
    last_run: datetime | None = await conn.fetchval(_Q["last_carried_out"], now + MAX_CLOCK_DIFFERENCE)
    rows = await conn.fetch(_Q["heartbeat_days"], last_run, now)
    evidence = plan.TimeEvidence(last_run, tuple(row["day"] for row in rows))
    return steps, None if context.confirmed else plan.confirmation_reason(days, steps, now, evidence)


class NightlyRun:
    """Carries out the plan of one nightly run."""

    def __init__(self, conn: Connection, store: Store, context: NightlyContext, now: datetime) -> None:
        self._conn, self._store, self._context, self._now = conn, store, context, now
        self._counts: Counter[str] = Counter()
        self._failures: list[str] = []
        self._failed: set[tuple[StepKind, str]] = set()
        self._actions: dict[StepKind, Callable[[Step], Awaitable[None]]] = {
            StepKind.FINALIZE: self._finalize,
            StepKind.REGISTER: self._register,
            StepKind.CREATE: self._create,
            StepKind.COUNT: self._count,
            StepKind.UPTIME: self._make_uptimes,
            StepKind.ARCHIVE: self._archive,
            StepKind.DROP: self._drop,
            StepKind.LATE: self._late,
            StepKind.FREEZE: self._freeze,
            StepKind.VACUUM: self._vacuum,
            StepKind.ANALYZE: self._analyze,
            StepKind.INACTIVE: self._mark_inactive,
            StepKind.DRILL: self._drill,
            StepKind.PRUNE: self._prune,
        }

    async def run(self) -> JobResult:
        """Carry out every step of the plan.

        Raises JobFailed before the first step if an operator must confirm the plan. Also raises JobFailed when the
        connection is lost, and with it the lock.
        """
        clean_spool(self._context.spool)
        steps, confirm_reason = await _make_plan(self._conn, self._now, self._context)
        if confirm_reason:
            raise JobFailed(confirm_reason, hint=CONFIRM_HINT)
        for step in steps:
            if any((kind, step.target) in self._failed for kind in step.needs):
                self._failed.add((step.kind, step.target))
                continue
            await self._carry_out(step)
        return JobResult(dict(self._counts), tuple(self._failures))

    async def _carry_out(self, step: Step) -> None:
        try:
            await self._actions[step.kind](step)
        except Exception as error:
            reason = f"{step.kind} {step.target}: {error or type(error).__name__}"
            # The message of an expected error is sufficient; stack traces of several failed steps would bury it.
            trace = None if isinstance(error, NexhbError) else error
            _log.error(
                "nightly_maintenance.step_failed", step=step.kind, target=step.target, reason=reason, exc_info=trace
            )
            if isinstance(error, LockLost) or not await self._holds_lock():
                raise JobFailed(f"The job's connection was lost: {reason}") from error
            self._failures.append(reason)
            self._failed.add((step.kind, step.target))
            self._counts["failed_steps"] += 1

    async def _holds_lock(self) -> bool:
        """Return whether the connection works and holds the lock. A query to the server decides, because a connection
        that is just being lost does not report this yet."""
        try:
            await locks.check(self._conn, Lock.NIGHTLY)
        except (LockLost, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        return True

    # ---- partitions -------------------------------------------------------------------------------------------------

    async def _finalize(self, step: Step) -> None:
        await retirement.detach(self._conn, step.target)
        self._counts["detaches_finished"] += 1

    async def _register(self, step: Step) -> None:
        day = _day(step)
        await retirement.register(self._conn, day.name, day.start, day.end)
        self._counts["adopted"] += 1

    async def _create(self, step: Step) -> None:
        assert step.new_day is not None  # noqa: S101 - every CREATE has it
        await partitions.ensure(self._conn, [step.new_day])
        self._counts["created"] += 1

    async def _count(self, step: Step) -> None:
        rows = await partitions.count_rows(self._conn, step.target)
        await self._conn.execute(_P["counted"], step.target, rows, self._now)
        self._counts["counted"] += 1

    # ---- uptimes ----------------------------------------------------------------------------------------------------

    async def _make_uptimes(self, step: Step) -> None:
        day, context = _day(step), self._context
        for each in plan.dates(day):
            source = DayTable(each, day.name)
            self._counts["device_days"] += await device_days.make_due(
                self._conn, source, context.uptime, self._now, context.checkpoint
            )

    # ---- archive and drop -------------------------------------------------------------------------------------------

    async def _archive(self, step: Step) -> None:
        day = _day(step)
        _log.info("archive.start", partition=day.name, reason=step.reason)
        try:
            rows, url = await self._store_and_verify(day)
        except Exception as error:
            await self._record_failure(day.name, error)
            raise
        metrics.partitions_archived.inc()
        self._counts["archived"] += 1
        _log.info("archive.end", partition=day.name, rows=rows, url=url)

    async def _store_and_verify(self, day: Day) -> tuple[int, str]:
        context, checkpoint = self._context, self._context.checkpoint
        await self._require_store()
        await retirement.detach(self._conn, day.name)
        checkpoint("detached")
        await retirement.seal(self._conn, day.name, day.start, day.end)
        checkpoint("sealed")
        source = ArchivedTable(day.name, "day", day.name, day.start, day.end)
        stored = await export(
            self._conn, source, self._store, context.spool, bucket_seconds=context.bucket_seconds, checkpoint=checkpoint
        )
        await verify.verify(self._store, stored.name, stored.sha256, context.spool)
        checkpoint("verified")
        manifest, url = stored.manifest, self._store.url(stored.name)
        await locks.check(self._conn, Lock.NIGHTLY)
        await catalog.record_archive(self._conn, manifest, stored.sha256, url, self._now)
        checkpoint("recorded")
        return manifest.rows, url

    async def _require_store(self) -> None:
        """Raise WrongStore, before anything is stored, if the store is not the one that the database knows."""
        await marker.require_marker(self._conn, self._store, self._context.spool, self._now)

    async def _record_failure(self, name: str, error: Exception) -> None:
        metrics.archive_failures.inc()
        reason = str(error) or type(error).__name__
        _log.error("archive.failed", partition=name, reason=reason)
        if not self._conn.is_closed():
            await self._conn.execute(_P["archive_failed"], name, reason[:2000], self._now)

    async def _drop(self, step: Step) -> None:
        day = _day(step)
        archived_earlier = not step.needs  # an earlier run archived the day; the archive may be damaged since
        if archived_earlier and not await retirement.is_sealed(self._conn, day.name):
            await self._archive(step)  # somebody unsealed the table, so its rows may have changed
        try:
            await self._require_store()
            if archived_earlier:
                for archived in await catalog.find(self._conn, day.start.date()):
                    name, spool = self._store.name_of(archived.url), self._context.spool
                    await verify.verify(self._store, name, archived.sha256, spool)
        except Exception as error:
            await self._record_failure(day.name, error)
            raise
        await retirement.drop(self._conn, day.name, self._now)
        self._context.checkpoint("dropped")
        self._counts["dropped"] += 1

    async def _late(self, step: Step) -> None:
        """Move a day's late heartbeats into its table, or into a supplement if the table was dropped.

        The day is read again, because earlier steps of this run may have changed its state.
        """
        day = next((d for d in await read_days(self._conn, self._now) if d.name == step.target), None)
        if day is None or not day.late:
            return
        dropped = day.state == "dropped"  # then a table with its name is not the day's table
        if day.attached and not dropped:
            self._counts["late_merged"] += await retirement.merge_late(self._conn, day.name, day.start, day.end)
        elif dropped or not day.present:
            archives, context = await catalog.find(self._conn, day.start.date()), self._context
            await self._require_store()
            rows = await late.store_supplement(
                self._conn,
                self._store,
                archives,
                context.spool,
                self._now,
                bucket_seconds=context.bucket_seconds,
                checkpoint=context.checkpoint,
            )
            self._counts["late_archived"] += rows

    # ---- upkeep -----------------------------------------------------------------------------------------------------

    async def _freeze(self, step: Step) -> None:
        await partitions.vacuum(self._conn, step.target, freeze=True)
        await self._conn.execute(_P["frozen"], step.target, self._now)
        self._counts["frozen"] += 1

    async def _vacuum(self, step: Step) -> None:
        await partitions.vacuum(self._conn, step.target, freeze=False)
        self._counts["vacuumed"] += 1

    async def _analyze(self, _step: Step) -> None:
        await partitions.analyze_parent(self._conn)

    async def _mark_inactive(self, _step: Step) -> None:
        since = self._now - timedelta(days=self._context.rules.retention_days)
        self._counts["inactivated"] += _rows(await self._conn.execute(_Q["inactivate"], since))

    async def _drill(self, _step: Step) -> None:
        archives = await catalog.current_archives(self._conn)
        if not archives:
            return
        archived = self._context.random.choice(archives)
        rows = await restore.drill(self._conn, self._store, archived, self._context.spool)
        await catalog.record_drill(self._conn, archived, self._now)
        metrics.last_drill.set(self._now.timestamp())
        _log.info("archive.drill", partition=archived.partition, rows=rows, url=archived.url)
        self._counts["drilled"] += 1

    async def _prune(self, _step: Step) -> None:
        await self._conn.execute(_Q["prune_runs"], self._now - RUNS_KEPT)
        await self._conn.execute(_Q["prune_flag_changes"], self._now - RUNS_KEPT)
        await self._conn.execute(_Q["prune_comparisons"], self._now - COMPARISONS_KEPT)
        await retention.prune(self._conn, self._now - self._context.events_kept)
        await months.keep(self._conn, self._now.date(), self._context.uptime.retention_days)
        await partitions.fold_ledger(self._conn, (self._now - self._context.rules.accept_past).date())


def _day(step: Step) -> Day:
    assert step.day is not None  # noqa: S101 - every step on a day has it
    return step.day


def _rows(status: Any) -> int:
    return int(str(status).rpartition(" ")[2])
