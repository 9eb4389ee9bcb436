"""Plan a nightly run: the steps that the present partitions require. Pure. `nexhb nightly --dry-run` prints it."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise


class StepKind(enum.StrEnum):
    """The kinds of steps of a nightly run, in their order."""

    FINALIZE = "finalize"  # finish an interrupted detach
    REGISTER = "adopt"  # record an attached partition in hb_partitions
    CREATE = "create"
    COUNT = "count"
    UPTIME = "uptime"  # make the rows of device_days of a day
    ARCHIVE = "archive"  # detach and seal a day, export it and verify the archive
    DROP = "drop"  # drop a day's table once its archive is verified
    LATE = "late"  # move late heartbeats into their day's table or into a supplement
    FREEZE = "freeze"
    VACUUM = "vacuum"
    ANALYZE = "analyze"
    INACTIVE = "inactive"  # mark devices that have been silent for longer than the retention
    DRILL = "drill"  # restore an archived day as a trial, and compare the rows
    PRUNE = "prune"  # delete old runs, events and uptimes, merge old rows of the ledger


@dataclass(frozen=True)
class Day:
    """One partition, according to hb_partitions and PostgreSQL's catalog."""

    name: str
    start: datetime
    end: datetime
    state: str  # state in hb_partitions; "unknown" if the partition is attached, but not recorded as attached
    attached: bool
    present: bool  # whether a table of that name exists
    detach_pending: bool = False
    restored: bool = False
    counted_at: datetime | None = None
    frozen: bool = False
    late: int = 0  # number of late heartbeats of the day
    uptime_due: str = ""  # why the uptimes of the day must be made (again); empty if they need not


@dataclass(frozen=True)
class NightlyRules:
    """The settings that determine the plan."""

    retention_days: int
    days_ahead: int
    accept_past: timedelta


@dataclass(frozen=True)
class Step:
    """One operation on one target."""

    kind: StepKind
    target: str
    reason: str
    day: Day | None = None
    new_day: date | None = None  # the day that CREATE creates
    needs: tuple[StepKind, ...] = ()  # skip this step if a step of these kinds on the same target failed in this run


MAX_SILENCE = timedelta(days=14)  # after a longer time without a run and without heartbeats, an operator must confirm
MAX_UNEXPLAINED_DAYS = 7


@dataclass(frozen=True)
class TimeEvidence:
    """Facts that show whether the clock may be right: the time of the last run, and the days with heartbeats."""

    last_run: datetime | None  # time of the last run that carried out its steps, even if some failed
    heartbeat_days: tuple[date, ...]  # UTC days with committed heartbeats since that run


def confirmation_reason(
    days: Sequence[Day], steps: Sequence[Step], now: datetime, evidence: TimeEvidence
) -> str | None:
    """Return why an operator must confirm a run with these steps; None if nothing is unusual.

    If the clock is ahead, days look older than they are. Of all steps, only archiving and dropping are irreversible.
    """
    leaving = {step.target for step in steps if step.kind in (StepKind.ARCHIVE, StepKind.DROP)}
    if not leaving:
        return None
    summary = f"{len(leaving)} days would be archived and dropped"
    seen = sorted({*([evidence.last_run.date()] if evidence.last_run else []), *evidence.heartbeat_days})
    seen = [day for day in seen if day <= now.date()]
    gaps = [(later - earlier, earlier, later) for earlier, later in pairwise([*seen, now.date()])]
    gap, earlier, later = max(gaps, default=(timedelta(), now.date(), now.date()))
    if gap > MAX_SILENCE:
        return (
            f"This machine's clock says {now:%Y-%m-%d %H:%MZ}, and from {earlier} to {later}, {gap.days} days, "
            f"there was neither a run nor a heartbeat; {summary}."
        )
    attached = {day.name for day in days if day.attached and not day.restored}
    leaving_attached = len(leaving & attached)
    passed = (now.date() - evidence.last_run.date()).days if evidence.last_run else 0
    if leaving_attached * 3 > len(attached) and leaving_attached - passed > MAX_UNEXPLAINED_DAYS:
        since = f"the last run was {passed} days ago" if evidence.last_run else "there has been no run"
        return (
            f"{summary}, {leaving_attached} of the {len(attached)} attached days; {since}, "
            f"which explains {passed} of them."
        )
    return None


def nightly(days: Sequence[Day], now: datetime, rules: NightlyRules) -> list[Step]:
    """Return every step, in order. `days` are the rows of hb_partitions and the attached partitions; `now` is UTC."""
    days = sorted(days, key=lambda day: (day.start, day.name))
    oldest_kept = now.date() - timedelta(days=rules.retention_days)
    old = [day for day in days if day.end.date() <= oldest_kept and (_is_current(day) or _is_detached(day))]
    kept = [day for day in days if day.attached and not day.detach_pending and day not in old]
    return [
        *_finalize(days),
        *(
            Step(StepKind.REGISTER, d.name, "attached, but not recorded so in hb_partitions", d)
            for d in days
            if _is_unknown(d)
        ),
        *(
            Step(StepKind.REGISTER, d.name, "archiving the day failed, and the day is no longer due", d)
            for d in kept
            if _has_failed(d)
        ),
        *_create(days, now, rules, oldest_kept),
        *_count(days, now, rules),
        *(Step(StepKind.UPTIME, d.name, d.uptime_due, d) for d in days if d.uptime_due),
        *_archive(days, old, oldest_kept),
        *(Step(StepKind.LATE, d.name, f"the day has {d.late} late heartbeats", d) for d in days if d.late),
        *_freeze(kept, now, rules),
        *_vacuum(kept, now),
        Step(StepKind.ANALYZE, "device_heartbeats", "autovacuum never analyzes a partitioned table"),
        Step(StepKind.INACTIVE, "device_last_status", f"devices silent for more than {rules.retention_days} days"),
        Step(StepKind.DRILL, "archives", "a random archive is restored and compared"),
        Step(StepKind.PRUNE, "job_runs", "old runs, events and uptimes; the ledger of closed days is merged"),
    ]


def _finalize(days: Sequence[Day]) -> Iterator[Step]:
    for day in days:
        if day.detach_pending:
            yield Step(StepKind.FINALIZE, day.name, "the detach was interrupted", day)


def _create(days: Sequence[Day], now: datetime, rules: NightlyRules, oldest_kept: date) -> Iterator[Step]:
    """Create the days that are missing from the oldest day to the last future day, but never an archived day."""
    today = now.date()
    attached = [day for day in days if day.attached and not day.restored]
    existing = {
        d for day in days for d in dates(day) if day.attached or day.present or day.state not in _MAY_BE_CREATED
    }
    first = min([today - timedelta(days=rules.accept_past.days), *(d.start.date() for d in attached)])
    day = max(first, oldest_kept)
    while day <= today + timedelta(days=rules.days_ahead):
        if day not in existing:
            ahead = (day - today).days
            yield Step(StepKind.CREATE, f"{day}", f"{ahead} days ahead" if ahead > 0 else "a gap", new_day=day)
        day += timedelta(days=1)


def _is_unknown(day: Day) -> bool:
    return day.state == "unknown"


def _has_failed(day: Day) -> bool:
    return day.state == "archive_failed"


_MAY_BE_CREATED = ("unknown", "active")


def dates(day: Day) -> Iterator[date]:
    """Yield the UTC days that the partition covers; it is one, unless somebody created the partition by hand."""
    first, moment = day.start.date(), day.start
    while moment < day.end:
        yield first
        first += timedelta(days=1)
        moment += timedelta(days=1)


def _count(days: Sequence[Day], now: datetime, rules: NightlyRules) -> Iterator[Step]:
    """Count the rows of each day whose rows may have changed since the last count. Rows may arrive until
    ingest.accept_past after the end of the day."""
    for day in days:
        if not _is_current(day) or day.detach_pending or day.start > now:
            continue
        if day.counted_at is None or day.counted_at <= day.end + rules.accept_past:
            yield Step(
                StepKind.COUNT,
                day.name,
                "never counted" if day.counted_at is None else "the number of rows may have changed",
                day,
            )


def _archive(days: Sequence[Day], old: Sequence[Day], oldest_kept: date) -> Iterator[Step]:
    for day in days:
        if day.restored or day.state == "dropped" or not (day in old or _is_detached(day) or day.detach_pending):
            continue
        if day.state == "archived" and not day.attached:
            yield Step(StepKind.DROP, day.name, "archived by an earlier run, but its table still exists", day)
            continue
        reason = f"older than {oldest_kept}" if day in old else "detached, and not archived yet"
        if day.state == "archive_failed":
            reason = "the last attempt failed"
        # A day whose uptimes were not made keeps its heartbeats.
        yield Step(StepKind.ARCHIVE, day.name, reason, day, needs=(StepKind.FINALIZE, StepKind.UPTIME))
        yield Step(StepKind.DROP, day.name, "once its archive is verified", day, needs=(StepKind.ARCHIVE,))


def _is_current(day: Day) -> bool:
    """Return whether the day is attached and was not dropped. If a table is attached for a dropped day, somebody else
    created that table, and archiving it would replace the day's archive."""
    return day.attached and day.state != "dropped"


def _is_detached(day: Day) -> bool:
    """Return whether the day's table is detached. A detached table is archived whatever its age, because it gets no
    more heartbeats. A table that has the name of a dropped day was not created by nexhb."""
    return day.present and not day.attached and day.state in ("active", "archived", "archive_failed")


def _freeze(kept: Sequence[Day], now: datetime, rules: NightlyRules) -> Iterator[Step]:
    for day in kept:
        if not day.frozen and day.end + rules.accept_past <= now:
            yield Step(StepKind.FREEZE, day.name, "closed: no more heartbeats are accepted for it", day)


def _vacuum(kept: Sequence[Day], now: datetime) -> Iterator[Step]:
    for day in kept:
        if now - timedelta(days=7) <= day.end and day.start <= now:
            yield Step(StepKind.VACUUM, day.name, "the day is one of the last 7", day)
    yield Step(StepKind.VACUUM, "device_last_status", "the rows change every minute")
