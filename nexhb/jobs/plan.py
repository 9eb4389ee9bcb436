"""What a nightly run has to do, from what there is. Pure: the same list that `nexhb nightly --dry-run` prints."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise


class Kind(enum.StrEnum):
    """The operations of a nightly run, in their order."""

    FINALIZE = "finalize"  # a detach that was interrupted
    ADOPT = "adopt"  # a partition that hb_partitions does not know
    CREATE = "create"
    COUNT = "count"
    ARCHIVE = "archive"  # detach, seal, export, read back, verify
    DROP = "drop"  # what is archived and verified
    LATE = "late"  # late heartbeats into their day's table or into a supplement
    FREEZE = "freeze"
    VACUUM = "vacuum"
    ANALYZE = "analyze"
    INACTIVE = "inactive"  # devices that have been silent for longer than the retention
    DRILL = "drill"  # an archived day restored and compared
    PRUNE = "prune"  # old rows of job_runs and of the ledger


@dataclass(frozen=True)
class Day:
    """One partition: what hb_partitions and the catalog say of it."""

    name: str
    start: datetime
    end: datetime
    state: str  # as in hb_partitions; "unknown" where it is attached, and its row there is missing or says otherwise
    attached: bool
    present: bool  # there is a table of that name
    detach_pending: bool = False
    restored: bool = False
    counted_at: datetime | None = None
    frozen: bool = False
    late: int = 0  # late heartbeats that wait for it


@dataclass(frozen=True)
class Rules:
    """What the settings ask for."""

    retention_days: int
    days_ahead: int
    accept_past: timedelta


@dataclass(frozen=True)
class Step:
    """One operation, on one target."""

    kind: Kind
    target: str
    reason: str
    day: Day | None = None
    make: date | None = None  # of CREATE
    needs: Kind | None = None  # does nothing where such a step on the same target failed in this run


FAR = timedelta(days=14)  # a daemon that was off for longer asks before it drops what became old meanwhile
MANY_DAYS = 7


@dataclass(frozen=True)
class Witnesses:
    """What speaks for it that the time went by which the clock says went by."""

    last_run: datetime | None  # of the runs that were gone through with, whatever failed in them
    heartbeat_days: tuple[date, ...]  # UTC days since then of which heartbeats were committed


def doubt(days: Sequence[Day], steps: Sequence[Step], now: datetime, witnesses: Witnesses) -> str | None:
    """Why a run with these steps is not to be made unless somebody says that it is; None where all is as usual.

    A clock that is ahead makes every day an old one. Nothing but archiving and dropping cannot be taken back.
    """
    leaving = {step.target for step in steps if step.kind in (Kind.ARCHIVE, Kind.DROP)}
    if not leaving:
        return None
    said = f"{len(leaving)} days would be archived and dropped"
    seen = sorted({*([witnesses.last_run.date()] if witnesses.last_run else []), *witnesses.heartbeat_days})
    seen = [day for day in seen if day <= now.date()]
    gaps = [(later - earlier, earlier, later) for earlier, later in pairwise([*seen, now.date()])]
    gap, earlier, later = max(gaps, default=(timedelta(), now.date(), now.date()))
    if gap > FAR:
        return (
            f"It is {now:%Y-%m-%d %H:%MZ} by this machine's clock, and from {earlier} to {later}, {gap.days} days, "
            f"there was neither a run nor a heartbeat; {said}."
        )
    standing = {day.name for day in days if day.attached and not day.restored}
    whole = len(leaving & standing)
    passed = (now.date() - witnesses.last_run.date()).days if witnesses.last_run else 0
    if whole * 3 > len(standing) and whole - passed > MANY_DAYS:
        since = f"the last run, {passed} days ago," if witnesses.last_run else "no run at all"
        said += f", {whole} of the {len(standing)} that are attached"
        return f"{said}; the time since {since} explains {passed} of them."
    return None


def nightly(days: Sequence[Day], now: datetime, rules: Rules) -> list[Step]:
    """Every step, in order. `days`: every row of hb_partitions and every attached partition; `now` in UTC."""
    days = sorted(days, key=lambda day: (day.start, day.name))
    oldest_kept = now.date() - timedelta(days=rules.retention_days)
    old = [day for day in days if day.end.date() <= oldest_kept and (_ours(day) or _leaving(day))]
    kept = [day for day in days if day.attached and not day.detach_pending and day not in old]
    return [
        *_finalize(days),
        *(Step(Kind.ADOPT, d.name, "attached, but hb_partitions does not say so", d) for d in days if _unknown(d)),
        *(Step(Kind.ADOPT, d.name, "its archive failed, and now it is kept", d) for d in kept if _failed(d)),
        *_create(days, now, rules, oldest_kept),
        *_count(days, now, rules),
        *_archive(days, old, oldest_kept),
        *(Step(Kind.LATE, d.name, f"{d.late} late heartbeats wait for it", d) for d in days if d.late),
        *_freeze(kept, now, rules),
        *_vacuum(kept, now),
        Step(Kind.ANALYZE, "device_heartbeats", "a partitioned table is never analysed by itself"),
        Step(Kind.INACTIVE, "device_last_status", f"devices silent for more than {rules.retention_days} days"),
        Step(Kind.DRILL, "archives", "an archive is worth what its restore is worth"),
        Step(Kind.PRUNE, "job_runs", "runs older than a year; the ledger of closed days is folded"),
    ]


def _finalize(days: Sequence[Day]) -> Iterator[Step]:
    for day in days:
        if day.detach_pending:
            yield Step(Kind.FINALIZE, day.name, "its detach was interrupted", day)


def _create(days: Sequence[Day], now: datetime, rules: Rules, oldest_kept: date) -> Iterator[Step]:
    """From the oldest day that is there to the last one ahead, gaps filled; never one that is gone already."""
    today = now.date()
    attached = [day for day in days if day.attached and not day.restored]
    there = {d for day in days for d in _dates(day) if day.attached or day.present or day.state not in _MAY_BE_MADE}
    first = min([today - timedelta(days=rules.accept_past.days), *(d.start.date() for d in attached)])
    day = max(first, oldest_kept)
    while day <= today + timedelta(days=rules.days_ahead):
        if day not in there:
            ahead = (day - today).days
            yield Step(Kind.CREATE, f"{day}", f"{ahead} days ahead" if ahead > 0 else "a gap", make=day)
        day += timedelta(days=1)


def _unknown(day: Day) -> bool:
    return day.state == "unknown"


def _failed(day: Day) -> bool:
    return day.state == "archive_failed"


_MAY_BE_MADE = ("unknown", "active")


def _dates(day: Day) -> Iterator[date]:
    first, moment = day.start.date(), day.start
    while moment < day.end:
        yield first
        first += timedelta(days=1)
        moment += timedelta(days=1)


def _count(days: Sequence[Day], now: datetime, rules: Rules) -> Iterator[Step]:
    """What may have changed since it was counted last: rows arrive until the accept window has passed."""
    for day in days:
        if not _ours(day) or day.detach_pending or day.start > now:
            continue
        if day.counted_at is None or day.counted_at <= day.end + rules.accept_past:
            yield Step(Kind.COUNT, day.name, "never counted" if day.counted_at is None else "it still changes", day)


def _archive(days: Sequence[Day], old: Sequence[Day], oldest_kept: date) -> Iterator[Step]:
    for day in days:
        if day.restored or day.state == "dropped" or not (day in old or _leaving(day) or day.detach_pending):
            continue
        if day.state == "archived" and not day.attached:
            yield Step(Kind.DROP, day.name, "archived by an earlier run, its table is still there", day)
            continue
        why = f"older than {oldest_kept}" if day in old else "detached, and not archived yet"
        if day.state == "archive_failed":
            why = "its last try failed"
        yield Step(Kind.ARCHIVE, day.name, why, day, needs=Kind.FINALIZE if day.detach_pending else None)
        yield Step(Kind.DROP, day.name, "once its archive is verified", day, needs=Kind.ARCHIVE)


def _ours(day: Day) -> bool:
    """Attached, and no day of which there is an archive already: that one would be replaced by whatever somebody
    attached in its place."""
    return day.attached and day.state != "dropped"


def _leaving(day: Day) -> bool:
    """Detached, so on its way out whatever its age: it takes no heartbeats any more. A table of a dropped day's name is
    somebody's own."""
    return day.present and not day.attached and day.state in ("active", "archived", "archive_failed")


def _freeze(kept: Sequence[Day], now: datetime, rules: Rules) -> Iterator[Step]:
    for day in kept:
        if not day.frozen and day.end + rules.accept_past <= now:
            yield Step(Kind.FREEZE, day.name, "closed: no heartbeat can come for it any more", day)


def _vacuum(kept: Sequence[Day], now: datetime) -> Iterator[Step]:
    for day in kept:
        if now - timedelta(days=7) <= day.end and day.start <= now:
            yield Step(Kind.VACUUM, day.name, "of the last 7 days", day)
    yield Step(Kind.VACUUM, "device_last_status", "every row of it changes every minute")
