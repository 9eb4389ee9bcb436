"""The nightly run: the plan, carried out step by step. Each step can be killed anywhere and done again; one that fails
is the run's failure, and stops only what depends on it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from asyncpg import Record

from nexhb import clock, locks, log, metrics, partitions, sql
from nexhb.archive import catalog, late, marker, restore, verify
from nexhb.archive.export import BUCKET_SECONDS, Source, clean_spool, export
from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.errors import JobFailed, LockLost, NexhbError
from nexhb.jobs import plan
from nexhb.jobs.plan import Day, Kind, Step
from nexhb.jobs.runner import CLOCKS_DIFFER, Done, Job
from nexhb.locks import Lock
from nexhb.partitions import Partition

_P = sql.queries("partitions")
_Q = sql.queries("jobs")
_log = log.get("jobs")

RUNS_KEPT = timedelta(days=366)
YES = "Set the clock; if the clock is right: `nexhb nightly --yes`, or POST /ops/nightly?yes=true."
COMPARISONS_KEPT = timedelta(days=8)  # of perf_diff, a week of them is looked at


def nothing(_point: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Means:
    """What a nightly run works with."""

    rules: plan.Rules
    store: Callable[[], AbstractAsyncContextManager[Store]]
    spool: Path  # a folder for objects on their way
    random: random.Random = field(default_factory=random.SystemRandom)  # which day is drilled
    at: Callable[[str], None] = nothing  # hears of each thing that is durable; the tests kill a run there
    bucket_seconds: int = BUCKET_SECONDS  # of the days that are archived, as a rule
    compare_clocks: bool = False  # do nothing where this machine's clock is not the database's
    yes: bool = False  # somebody said that most of what stands may leave, or that the clock is right


def job(means: Means) -> Job:
    """The job."""

    async def work(conn: Connection, now: datetime) -> Done:
        if means.compare_clocks:
            await _compare_clocks(conn, now)
        async with means.store() as store:
            return await Night(conn, store, means, now).run()

    return Job("nightly", Lock.NIGHTLY, "nightly_maintenance", work)


async def _compare_clocks(conn: Connection, now: datetime) -> None:
    """Raise JobFailed where one clock is far ahead: by it, days that still fill would be old, archived and dropped."""
    theirs = (await clock.look(conn))[0]
    if abs(now - theirs) > CLOCKS_DIFFER:
        raise JobFailed(
            f"It is {now:%Y-%m-%d %H:%MZ} here and {theirs:%Y-%m-%d %H:%MZ} in the database: set the clocks."
        )


def dry_run(means: Means) -> Job:
    """The same, which only says what would be done."""

    async def work(conn: Connection, now: datetime) -> Done:
        steps, doubt = await _planned(conn, now, means)
        listed = [{"step": s.kind, "target": s.target, "reason": s.reason} for s in steps]
        return Done({"dry_run": True, "plan": listed} | ({"asks": f"{doubt} {YES}"} if doubt else {}))

    return Job("nightly", Lock.NIGHTLY, "nightly_maintenance", work, dry_run=True)


async def _planned(conn: Connection, now: datetime, means: Means) -> tuple[list[Step], str | None]:
    """The steps, and why they are not to be gone without somebody's word."""
    days = await read_days(conn, now)
    steps = plan.nightly(days, now, means.rules)
    last_run: datetime | None = await conn.fetchval(_Q["last_gone_through"], now + CLOCKS_DIFFER)
    seen = await conn.fetch(_Q["heartbeat_days"], last_run, now)
    witnesses = plan.Witnesses(last_run, tuple(row["day"] for row in seen))
    return steps, None if means.yes else plan.doubt(days, steps, now, witnesses)


async def read_days(conn: Connection, now: datetime | None = None) -> list[Day]:
    """Every partition that hb_partitions or the catalog knows. What was done to one after `now`, by a clock that was
    ahead, was not done."""
    attached = {p.name: p for p in await partitions.attached(conn)}
    late_rows = {row["day"]: row["rows"] for row in await conn.fetch(_P["late"])}
    days = [
        _known_day(row, attached.get(row["partition_name"]), late_rows, now)
        for row in await partitions.known(conn)
        if row["attached"] == (row["partition_name"] in attached)  # else its bounds cannot be read: it is left alone
    ]
    known = {day.name for day in days}
    return days + [
        Day(p.name, p.start, p.end, "unknown", attached=True, present=True, detach_pending=p.detach_pending)
        for p in attached.values()
        if p.name not in known
    ]


def _known_day(row: Record, found: Partition | None, late_rows: dict[date, int], now: datetime | None) -> Day:
    """A day as hb_partitions has it; of one that is `found` attached, the catalog's bounds count."""
    start, end = (found.start, found.end) if found else (row["range_start"], row["range_end"])
    return Day(
        name=row["partition_name"],
        start=start,
        end=end,
        state=_state(row, found),
        attached=found is not None,
        present=row["present"],
        detach_pending=found is not None and found.detach_pending,
        restored=row["restored_at"] is not None,
        counted_at=None if _lies_ahead(row["counted_at"], now) else row["counted_at"],
        frozen=row["frozen_at"] is not None and not _lies_ahead(row["frozen_at"], now),
        late=sum(n for day, n in late_rows.items() if start.date() <= day < end.date()),
    )


def _lies_ahead(moment: datetime | None, now: datetime | None) -> bool:
    return moment is not None and now is not None and moment > now + CLOCKS_DIFFER


def _state(row: Record, found: Partition | None) -> str:
    state: str = row["state"]
    if found and state != "dropped":
        told = (row["range_start"], row["range_end"]) == (found.start, found.end)
        return state if told and state != "archived" and not found.sealed else "unknown"  # attached by hand
    if state == "active" and row["archive_url"] and not row["present"]:
        return "dropped"  # restored, and dropped by hand: its archive is all there is of it
    return state


class Night:
    """One run."""

    def __init__(self, conn: Connection, store: Store, means: Means, now: datetime) -> None:
        self._conn, self._store, self._means, self._now = conn, store, means, now
        self._counts: Counter[str] = Counter()
        self._failures: list[str] = []
        self._failed: set[tuple[Kind, str]] = set()
        self._do: dict[Kind, Callable[[Step], Awaitable[None]]] = {
            Kind.FINALIZE: self._finalize, Kind.ADOPT: self._adopt, Kind.CREATE: self._create, Kind.COUNT: self._count,
            Kind.ARCHIVE: self._archive, Kind.DROP: self._drop, Kind.LATE: self._late, Kind.FREEZE: self._freeze,
            Kind.VACUUM: self._vacuum, Kind.ANALYZE: self._analyze, Kind.INACTIVE: self._inactivate,
            Kind.DRILL: self._drill, Kind.PRUNE: self._prune,
        }  # fmt: skip

    async def run(self) -> Done:
        """Every step of the plan. Raises where the connection, and with it the lock, is lost, and before the first step
        where somebody is to be asked."""
        clean_spool(self._means.spool)
        steps, doubt = await _planned(self._conn, self._now, self._means)
        if doubt:
            raise JobFailed(doubt, hint=YES)
        for step in steps:
            if step.needs and (step.needs, step.target) in self._failed:
                self._failed.add((step.kind, step.target))
                continue
            await self._try(step)
        return Done(dict(self._counts), tuple(self._failures))

    async def _try(self, step: Step) -> None:
        try:
            await self._do[step.kind](step)
        except Exception as error:
            reason = f"{step.kind} {step.target}: {error or type(error).__name__}"
            # A foreseen one says all in its sentence; the trace of four days' archives would bury it.
            trace = None if isinstance(error, NexhbError) else error
            _log.error(
                "nightly_maintenance.step_failed", step=step.kind, target=step.target, reason=reason, exc_info=trace
            )
            if isinstance(error, LockLost) or not await self._is_ours():
                raise JobFailed(f"Its connection was lost: {reason}") from error
            self._failures.append(reason)
            self._failed.add((step.kind, step.target))
            self._counts["failed_steps"] += 1

    async def _is_ours(self) -> bool:
        """Whether there is a connection that holds the lock. One that is just being lost does not know it yet."""
        try:
            await locks.check(self._conn, Lock.NIGHTLY)
        except (LockLost, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        return True

    # ---- the days -------------------------------------------------------------------------------------------------

    async def _finalize(self, step: Step) -> None:
        await partitions.detach(self._conn, step.target)
        self._counts["detaches_finished"] += 1

    async def _adopt(self, step: Step) -> None:
        day = _day(step)
        await partitions.adopt(self._conn, day.name, day.start, day.end)
        self._counts["adopted"] += 1

    async def _create(self, step: Step) -> None:
        assert step.make is not None  # noqa: S101 - every CREATE has it
        await partitions.ensure(self._conn, [step.make])
        self._counts["created"] += 1

    async def _count(self, step: Step) -> None:
        rows = await partitions.count(self._conn, step.target)
        await self._conn.execute(_P["counted"], step.target, rows, self._now)
        self._counts["counted"] += 1

    # ---- out ------------------------------------------------------------------------------------------------------

    async def _archive(self, step: Step) -> None:
        day = _day(step)
        _log.info("archive.start", partition=day.name, reason=step.reason)
        try:
            rows, url = await self._stored_and_verified(day)
        except Exception as error:
            await self._archive_failed(day.name, error)
            raise
        metrics.partitions_archived.inc()
        self._counts["archived"] += 1
        _log.info("archive.end", partition=day.name, rows=rows, url=url)

    async def _stored_and_verified(self, day: Day) -> tuple[int, str]:
        means, at = self._means, self._means.at
        await self._right_store()
        await partitions.detach(self._conn, day.name)
        at("detached")
        await partitions.seal(self._conn, day.name, day.start, day.end)
        at("sealed")
        source = Source(day.name, "day", day.name, day.start, day.end)
        stored = await export(self._conn, source, self._store, means.spool, bucket_seconds=means.bucket_seconds, at=at)
        await verify.verify(self._store, stored.name, stored.sha256, means.spool)
        at("verified")
        manifest, url = stored.manifest, self._store.url(stored.name)
        await locks.check(self._conn, Lock.NIGHTLY)
        await catalog.record(self._conn, manifest, stored.sha256, url, self._now)
        at("recorded")
        return manifest.rows, url

    async def _right_store(self) -> None:
        """Raise WrongStore where the store is not the one that the database knows: nothing goes there."""
        await marker.ensure(self._conn, self._store, self._means.spool, self._now)

    async def _archive_failed(self, name: str, error: Exception) -> None:
        metrics.archive_failures.inc()
        reason = str(error) or type(error).__name__
        _log.error("archive.failed", partition=name, reason=reason)
        if not self._conn.is_closed():
            await self._conn.execute(_P["archive_failed"], name, reason[:2000], self._now)

    async def _drop(self, step: Step) -> None:
        day = _day(step)
        earlier = step.needs is None  # an earlier run archived it: what that run saw may have rotted since
        if earlier and not await partitions.is_sealed(self._conn, day.name):
            await self._archive(step)  # somebody let it take rows again
        try:
            await self._right_store()
            if earlier:
                for archived in await catalog.find(self._conn, day.start.date()):
                    name, spool = self._store.name_of(archived.url), self._means.spool
                    await verify.verify(self._store, name, archived.sha256, spool)
        except Exception as error:
            await self._archive_failed(day.name, error)
            raise
        await partitions.drop(self._conn, day.name, self._now)
        self._means.at("dropped")
        self._counts["dropped"] += 1

    async def _late(self, step: Step) -> None:
        """Where the day stands now, behind this run's own steps, decides where they go."""
        day = next((d for d in await read_days(self._conn, self._now) if d.name == step.target), None)
        if day is None or not day.late:
            return
        gone = day.state == "dropped"  # a table of its name is somebody's own
        if day.attached and not gone:
            self._counts["late_merged"] += await partitions.merge_late(self._conn, day.name, day.start, day.end)
        elif gone or not day.present:
            archives, means = await catalog.find(self._conn, day.start.date()), self._means
            await self._right_store()
            rows = await late.supplement(
                self._conn,
                self._store,
                archives,
                means.spool,
                self._now,
                bucket_seconds=means.bucket_seconds,
                at=means.at,
            )
            self._counts["late_archived"] += rows

    # ---- upkeep ---------------------------------------------------------------------------------------------------

    async def _freeze(self, step: Step) -> None:
        await partitions.vacuum(self._conn, step.target, freeze=True)
        await self._conn.execute(_P["frozen"], step.target, self._now)
        self._counts["frozen"] += 1

    async def _vacuum(self, step: Step) -> None:
        await partitions.vacuum(self._conn, step.target, freeze=False)
        self._counts["vacuumed"] += 1

    async def _analyze(self, _step: Step) -> None:
        await partitions.analyze_parent(self._conn)

    async def _inactivate(self, _step: Step) -> None:
        since = self._now - timedelta(days=self._means.rules.retention_days)
        self._counts["inactivated"] += _rows(await self._conn.execute(_Q["inactivate"], since))

    async def _drill(self, _step: Step) -> None:
        archives = await catalog.every(self._conn)
        if not archives:
            return
        archived = self._means.random.choice(archives)
        rows = await restore.drill(self._conn, self._store, archived, self._means.spool)
        await catalog.drilled(self._conn, archived, self._now)
        metrics.last_drill.set(self._now.timestamp())
        _log.info("archive.drill", partition=archived.partition, rows=rows, url=archived.url)
        self._counts["drilled"] += 1

    async def _prune(self, _step: Step) -> None:
        await self._conn.execute(_Q["prune_runs"], self._now - RUNS_KEPT)
        await self._conn.execute(_Q["prune_flag_changes"], self._now - RUNS_KEPT)
        await self._conn.execute(_Q["prune_comparisons"], self._now - COMPARISONS_KEPT)
        await partitions.fold_ledger(self._conn, (self._now - self._means.rules.accept_past).date())


def _day(step: Step) -> Day:
    assert step.day is not None  # noqa: S101 - every step on a day has it
    return step.day


def _rows(status: Any) -> int:
    return int(str(status).rpartition(" ")[2])
