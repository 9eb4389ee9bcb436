"""Is all well? One line a question, good or bad, with what mends it."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncpg import Record

from nexhb import clock, db, disk, flags, identity, migrate, numbers, partitions, perfdiff, sql
from nexhb.archive import adopt, marker
from nexhb.archive.store import open_store
from nexhb.config import Settings
from nexhb.db import Connection
from nexhb.jobs import schedule
from nexhb.jobs.runner import CLOCKS_DIFFER
from nexhb.legacy import source as sources
from nexhb.locks import Lock
from nexhb.texts import shown as shown_text

_Q = sql.queries("doctor")

AHEAD_MOST = timedelta(minutes=5)
LATE_FOR = timedelta(days=2)  # late heartbeats are carried away nightly
DRILL_WITHIN = timedelta(days=8)
FIRST_RUN_WITHIN = timedelta(minutes=2)  # of the first start, and jobs.jitter_seconds; both jobs are due at once
STORE_NAMES_MOST, STORE_TIMEOUT_S = 20_000, 20  # what one visit asks of the archive's store
DRIFT_MOST = 0.01
LOCK_MOST_S = 6 * 3600  # one of our own jobs
STRANGER_MOST_S = 10  # anybody else, as long as heartbeats or jobs wait for them
HOT_LEAST, HOT_SAMPLE = 0.5, 10_000
DAYS_AHEAD_LEAST = 3
DISK_DAYS_LEAST = 7
MISMATCHES_OVER = timedelta(hours=24)
SHARED_WITHIN = timedelta(hours=24)
SOURCE_TIMEOUT_S = 5.0
NAMED = 10  # devices
REASON_MOST = 240  # characters; `GET /ops/jobs` has all of it


@dataclass(frozen=True)
class Line:
    """One answer."""

    name: str
    good: bool
    said: str
    remedy: str = ""  # a command, or where to read on


@dataclass(frozen=True)
class Visit:
    """What the doctor works with."""

    conn: Connection
    settings: Settings
    now: datetime


async def examine(conn: Connection, settings: Settings, now: datetime) -> list[Line]:
    """Every line, in the order in which one would look. `now` in UTC. A question that cannot be answered is bad."""
    visit = Visit(conn, settings, now)
    lines: list[Line] = []
    for name, ask in _QUESTIONS.items():
        try:
            lines.append(await ask(visit))
        except Exception as error:
            lines.append(Line(name, False, f"cannot be told: {error or type(error).__name__}", "see the daemon's log"))
        if name == "schema" and not lines[-1].good:
            break  # the other questions are about tables that another schema may not have
    return lines


async def _database(visit: Visit) -> Line:
    found = await db.unsafe_settings(visit.conn)
    version = visit.conn.get_server_version()  # asyncpg keeps the 4 of PostgreSQL 18.4 in micro: (18, 0, 4)
    if found:
        return Line("database", False, "; ".join(one.what for one in found), "; ".join(one.remedy for one in found))
    return Line("database", True, f"PostgreSQL {version.major}.{version.micro} keeps what it commits")


async def _copy(visit: Visit) -> Line:
    lacks = await identity.missing(visit.conn, visit.settings.data_dir)
    if not lacks:
        return Line("database copy", True, "has every generation that its daemons added")
    seen = ", ".join(f"{one.generation} (added by {one.host})" for one in lacks)
    said = f"an older copy: it lacks generation {seen}. Tokens that it does not know are answered 503"
    return Line("database copy", False, said, "nexhb database accept")


async def _clock(visit: Visit) -> Line:
    apart = clock.system_now() - (await clock.look(visit.conn))[0]
    row = await visit.conn.fetchrow(_Q["ahead"], AHEAD_MOST)
    assert row is not None  # noqa: S101 - an aggregate has one row
    seconds = round(apart.total_seconds())
    if because := clock.apart_because(apart):
        return Line("clock", False, because, "timedatectl, here and on the database's host")
    if row["devices"]:
        said = f"{row['devices']} devices were heard in the future, {row['device_id']} until {_at(row['heard_at'])}"
        return Line("clock", False, said, "set the clock of the database's host; their next heartbeats mend the rest")
    return Line("clock", True, f"{abs(seconds)} s {'behind' if seconds < 0 else 'ahead of'} the database's")


async def _schema(visit: Visit) -> Line:
    applied, known = await migrate.standing(visit.conn)
    remedy = "install the nexhb that applied it, or a newer one" if applied > known else "run nexhb migrate"
    said = f"at migration {applied} of {known}" if applied else "this database has no tables of nexhb"
    return Line("schema", applied == known, said, remedy)


async def _numbers(visit: Visit) -> Line:
    found = numbers.Dangling(await numbers.dangling_statuses(visit.conn), 0)
    found += await numbers.dangling_late(visit.conn, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
    today = partitions.name_of(visit.now.date())
    rows = await visit.conn.fetchval(_Q["rows"], partitions.quoted(today))
    if rows is not None:
        found += await numbers.dangling_in_sample(visit.conn, partitions.quoted(today), rows)
    if found.devices or found.labels:
        said = f"{found.devices} rows of today name a device that is not there, {found.labels} a label"
        return Line("numbers", False, said, f"nexhb audit --day {visit.now.date()}, and docs/runbook.md#rows-dangle")
    if behind := await numbers.behind(visit.conn):
        said = "; ".join(f"the next {row['what']} gets number {row['given'] + 1} of {row['used']}" for row in behind)
        return Line("numbers", False, said, "nexhb reconcile, or a daemon's restart: either raises the sequences")
    return Line("numbers", True, "every device and label that is named is there")


async def _days_ahead(visit: Visit) -> Line:
    ahead = await partitions.days_ahead(visit.conn, visit.now.date())
    wanted = min(DAYS_AHEAD_LEAST, visit.settings.partitions.days_ahead)
    # Not at once: of a day that somebody detached, the run would make an archive.
    remedy = "nexhb nightly --dry-run, and docs/runbook.md#nexhbdaysaheadmissing"
    said = f"{max(ahead, 0)} days without a gap"
    if ahead < wanted:
        gap = visit.now.date() + timedelta(days=ahead + 1)
        said += f", then {gap} is {await partitions.gone(visit.conn, gap) or 'not there'}"
    return Line("days ahead", ahead >= wanted, said, remedy)


async def _pending(visit: Visit) -> Line:
    if default := await partitions.default_partition(visit.conn):
        remedy = f"ALTER TABLE {partitions.PARENT} DETACH PARTITION {partitions.quoted(default)}, and docs/runbook.md"
        return Line("detaches", False, f"the DEFAULT partition {default} forbids each of them", remedy)
    names = [p.name for p in await partitions.attached(visit.conn) if p.detach_pending]
    said = f"pending: {', '.join(names)}" if names else "none is pending"
    return Line("detaches", not names, said, "nexhb nightly, once no long reader of device_heartbeats is left")


async def _old_days(visit: Visit) -> Line:
    kept = visit.now.date() - timedelta(days=visit.settings.partitions.retention_days + 1)
    rows = await partitions.known(visit.conn)
    old = [r for r in rows if r["present"] and not r["restored_at"] and r["range_end"].date() <= kept]
    failed = await visit.conn.fetch(_Q["failed_days"])
    if failed:
        said = f"{len(failed)} could not be archived, {failed[0]['partition_name']} because: {failed[0]['reason']}"
        return Line("archive", False, said, "mend the reason; nexhb nightly")
    return Line("archive", not old, f"{len(old)} days are older than the retention", "nexhb nightly")


async def _store(visit: Visit) -> Line:
    """By the names of the first objects; none is read but the marker."""
    settings = visit.settings
    async with asyncio.timeout(STORE_TIMEOUT_S), open_store(settings.archive_url, settings.archive) as store:
        if not await marker.is_right(visit.conn, store):
            return Line(
                "archive store", False, f"{marker.place_of(store)} lacks the marker that this database knows",
                "mount it, or correct archive.url; where it was moved: nexhb archive adopt",
            )  # fmt: skip
        found = await adopt.differences(visit.conn, store, STORE_NAMES_MOST)
    looked_at = f"of its first {found.looked_at:,} objects, " if found.looked_at == STORE_NAMES_MOST else ""
    said = [
        f"{looked_at}{len(names)} {what}, {names[0]} first"
        for what, names in (
            ("archives are of days that the catalog lacks", found.lacking),
            ("are other archives of days that the catalog has", found.others),
        )
        if names
    ]
    good = f"{looked_at}all archives are in the catalog"
    return Line("archive store", not said, "; ".join(said) or good, "nexhb archive adopt --dry-run")


async def _late(visit: Visit) -> Line:
    row = await visit.conn.fetchrow(_Q["late"])
    assert row is not None  # noqa: S101 - an aggregate has one row
    old = row["since"] is not None and abs(visit.now - row["since"]) > LATE_FOR
    return Line("late heartbeats", not old, f"{row['rows']} wait for the nightly run", "nexhb nightly")


def _job(name: str) -> Callable[[Visit], Awaitable[Line]]:
    async def ask(visit: Visit) -> Line:
        cron: str = getattr(visit.settings.jobs, name)
        row = await visit.conn.fetchrow(_Q["last_good"], name, visit.now + CLOCKS_DIFFER)
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        if not cron:
            return Line(
                name, row["good"] is not None, f"no schedule; last good run {_at(row['good'])}", f"nexhb {name}"
            )
        if _first_is_due(visit, row):
            return Line(name, True, "no run yet: the first is due, within minutes of the first start")
        # The run that is due now may be under way: the one before it must have been good.
        before = schedule.due_since(cron, visit.now - timedelta(hours=1), row["good"])
        why = f"; the last one failed: {textwrap.shorten(row['reason'], REASON_MOST)}" if row["reason"] else ""
        return Line(name, before is None, f"last good run {_at(row['good'])}{why}", f"nexhb {name}")

    return ask


def _first_is_due(visit: Visit, row: Record) -> bool:
    """No run has ended in any way, and the schema is as young as a house may be before its first."""
    young = FIRST_RUN_WITHIN + timedelta(seconds=visit.settings.jobs.jitter_seconds)
    return row["good"] is None and row["reason"] is None and abs(visit.now - row["schema_made"]) < young


async def _drill(visit: Visit) -> Line:
    row = await visit.conn.fetchrow(_Q["drills"], visit.now + CLOCKS_DIFFER)
    assert row is not None  # noqa: S101 - an aggregate has one row
    if not row["archives"]:
        return Line("restore drill", True, "nothing is archived yet")
    good = row["drilled_at"] is not None and visit.now - row["drilled_at"] <= DRILL_WITHIN
    return Line("restore drill", good, f"last good one {_at(row['drilled_at'])}", "nexhb archive verify --all")


async def _drift(visit: Visit) -> Line:
    row = await visit.conn.fetchrow(_Q["drift"])
    if row is None or not row["checked"]:
        return Line("drift", True, "nothing was checked yet")
    good = row["wrong"] / row["checked"] <= DRIFT_MOST
    return Line("drift", good, f"{row['wrong']} of {row['checked']} rows were wrong", "nexhb reconcile, until it is 0")


async def _locks(visit: Visit) -> Line:
    rows = await visit.conn.fetch(_Q["lock_holders"], int(min(Lock)), int(max(Lock)))
    others = await visit.conn.fetch(_Q["holding_up"], STRANGER_MOST_S)
    held = [f"{Lock(row['lock']).name.lower()} by {_session(row)}" for row in rows]
    held += [f"heartbeats or jobs wait for {_session(row)}" for row in others]
    stuck = [row["pid"] for row in rows if row["seconds"] > _lock_most_s(row)] + [row["pid"] for row in others]
    remedies = [f"SELECT pg_terminate_backend({pid})" for pid in dict.fromkeys(stuck)]
    for row in await visit.conn.fetch(_Q["prepared"], STRANGER_MOST_S):
        held.append(f"the prepared transaction {row['gid']} holds tables for {row['seconds']} s")
        remedies.append("COMMIT PREPARED or ROLLBACK PREPARED '" + row["gid"].replace("'", "''") + "'")
    return Line("locks", not remedies, ", ".join(held) or "nobody holds one", "; ".join(remedies))


def _lock_most_s(row: Record) -> int:
    return LOCK_MOST_S if (row["application_name"] or "").startswith("nexhb") else STRANGER_MOST_S


def _session(row: Record) -> str:
    who = f"{row['application_name'] or 'unnamed'}, {row['state'] or 'not to be seen'}"
    return f"pid {row['pid']} ({who}) for {row['seconds']} s"


async def _hot(visit: Visit) -> Line:
    row = await visit.conn.fetchrow(_Q["hot"])
    if row is None or row["updates"] < HOT_SAMPLE:
        return Line("HOT updates", True, "too few updates to tell")
    share = row["hot"] / row["updates"]
    return Line(
        "HOT updates", share >= HOT_LEAST, f"{share:.0%} of device_last_status", "VACUUM FULL device_last_status"
    )


async def _disk(visit: Visit) -> Line:
    of = visit.settings.database
    try:
        room = disk.room_at(visit.settings.data_dir)
    except OSError as error:
        if of.url is None:
            raise
        return Line("disk", True, f"the database's own disk is not ours to see; {error}")
    low = room.low(reserve_bytes=of.disk_reserve_bytes, reserve_inodes=of.disk_reserve_inodes, held=False)
    if of.url is not None and low is None:
        return Line("disk", True, "the database's own disk is not ours to see; data_dir has room")
    if of.url is not None:
        said = (
            f"data_dir, where archives are spooled: {room.free_bytes >> 20} MiB and {room.free_inodes} inodes are free"
        )
        return Line("disk", False, said, "make room, or move data_dir")
    if low is not None:
        return Line("disk", False, low.what, low.remedy)
    free = room.free_bytes
    day = await visit.conn.fetchval(_Q["day_bytes"], partitions.midnight(visit.now.date())) or 0
    left = free / day if day else float("inf")
    good = left >= DISK_DAYS_LEAST
    days = f", {left:,.0f} days at the present rate" if day else ""
    return Line("disk", good, f"{free >> 30} GiB are free{days}", "make room, or shorten partitions.retention_days")


async def _flags(visit: Visit) -> Line:
    first = flags.first_values(visit.settings.reads)
    now = await flags.read(visit.conn, first)
    said = (
        f"fast reads {f'for {now.rollout_percent} %' if now.read_from_last_status else 'off'}, "
        f"perf_diff {'on' if now.perf_diff else 'off'}"
    )
    mend = "nexhb perf-diff report; nexhb reconcile, or nexhb backfill; then nexhb flags set read_from_last_status=on"
    if off := await visit.conn.fetchval(_Q["turned_off"]):
        return Line("flags", False, f"perf_diff turned the fast reads off {_at(off)}: they were wrong", mend)
    if wrong := await perfdiff.mismatches(visit.conn, visit.now - MISMATCHES_OVER, visit.now + CLOCKS_DIFFER):
        return Line("flags", False, f"{said}; {wrong} comparisons of the last day differ", mend)
    # Whoever set one in the configuration may think that it counts. A default that was switched since is no surprise.
    written = {"from_last_status": "read_from_last_status"}
    for key in sorted(visit.settings.reads.model_fields_set & {"from_last_status", "rollout_percent", "perf_diff"}):
        flag = written.get(key, key)
        configured, counts = first.shown()[flag], now.shown()[flag]
        if configured != counts:
            return Line(
                "flags", False, f"{said}; the configuration's reads.{key} = {str(configured).lower()} does not count: "
                f"it is the first value, and {flag} was switched to {str(counts).lower()} since",
                f"take reads.{key} out, or nexhb flags set {flag}={str(configured).lower()}",
            )  # fmt: skip
    return Line("flags", True, said)


async def _shared(visit: Visit) -> Line:
    rows = await visit.conn.fetch(_Q["shared_tokens"], visit.now - SHARED_WITHIN)
    if not rows:
        return Line("shared tokens", True, "no token was seen in two kiosks within a day")
    named = ", ".join(shown_text(row["device_id"]) for row in rows[:NAMED]) + (", …" if len(rows) > NAMED else "")
    said = f"{len(rows)} tokens are in two kiosks each: {named}"
    return Line("shared tokens", False, said, "docs/runbook.md#a-token-in-two-kiosks")


async def _nexmdm(visit: Visit) -> Line:
    """Whether a device that enrols at NexMDM is known here, or else how long it is not."""
    source = visit.settings.legacy.source
    if source is None:
        run = await visit.conn.fetchrow(_Q["last_good"], "import", visit.now + CLOCKS_DIFFER)
        assert run is not None  # noqa: S101 - a SELECT without FROM has one row
        if run["good"] is None:
            return Line("NexMDM", True, "nothing was imported, and legacy.source is not set")
        said = (
            f"legacy.source is not set, and the last import was {_at(run['good'])}: a device that enrolled at NexMDM "
            "since then is answered 401 until the next import, and erases its credentials with its third heartbeat, "
            "which is 20 minutes at the agent's 600 s"
        )
        return Line("NexMDM", True, said)
    remedy = "mend it, or unset legacy.source once NexMDM is turned off: docs/moving.md#devices-that-enrol-at-nexmdm"
    try:
        opening = sources.opened(
            source.get_secret_value(),
            name="legacy.source",
            application="nexhb look-up",
            timeout_s=SOURCE_TIMEOUT_S,
            for_history=False,
        )
        async with asyncio.timeout(SOURCE_TIMEOUT_S), opening as nexmdm:
            of = await nexmdm.standing()
    except Exception as error:
        said = (
            f"legacy.source cannot be asked, so that unknown tokens are answered 503: {error or type(error).__name__}"
        )
        return Line("NexMDM", False, said, remedy)
    said = f"{nexmdm.name} is asked for tokens that nexhb does not know"
    if of.standby:
        behind = f"replayed up to {_at(of.replayed)}"
        said += f"; it is a standby, {behind}: a token is unknown once it has replayed a commit made a minute later"
    return Line("NexMDM", True, said)


async def _offline_after(visit: Visit) -> Line:
    of = visit.settings.heartbeat
    said = f"offline after {of.offline_after_seconds} s of silence, at an interval of {of.interval_seconds} s"
    return Line("offline after", not of.doubt(), of.doubt() or said, of.remedy())


def _at(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%MZ}" if moment else "never"


_QUESTIONS: dict[str, Callable[[Visit], Awaitable[Line]]] = {
    "database": _database, "clock": _clock, "schema": _schema, "database copy": _copy, "numbers": _numbers,
    "days ahead": _days_ahead, "detaches": _pending,
    "archive": _old_days, "archive store": _store, "late heartbeats": _late,
    "nightly": _job("nightly"), "reconcile": _job("reconcile"),
    "restore drill": _drill, "drift": _drift, "locks": _locks, "HOT updates": _hot, "disk": _disk, "flags": _flags,
    "shared tokens": _shared, "NexMDM": _nexmdm, "offline after": _offline_after,
}  # fmt: skip


def shown(lines: list[Line]) -> dict[str, Any]:
    """For machines."""
    return {
        "good": all(line.good for line in lines),
        "lines": [
            {"name": line.name, "good": line.good, "said": line.said, "remedy": "" if line.good else line.remedy}
            for line in lines
        ],
    }
