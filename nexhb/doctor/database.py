"""Checks of the database itself: what it keeps, which copy it is, its clock, its schema, its locks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from asyncpg import Record

from nexhb import clock, partitions
from nexhb.doctor.check import CheckContext, CheckResult, shown_time
from nexhb.postgres import connections, identity, migrate, numbers, sql
from nexhb.postgres.locks import Lock

_Q = sql.queries("doctor")

MAX_AHEAD = timedelta(minutes=5)
MAX_LOCK_S = 6 * 3600  # how long a session of nexhb may hold a lock
MAX_FOREIGN_LOCK_S = 10  # how long any other session may hold a lock for which heartbeats or jobs wait
MIN_HOT_SHARE, MIN_HOT_UPDATES = 0.5, 10_000


async def durability(context: CheckContext) -> CheckResult:
    """Check that PostgreSQL keeps what it commits."""
    problems = await connections.unsafe_settings(context.conn)
    version = context.conn.get_server_version()  # asyncpg keeps the 4 of PostgreSQL 18.4 in micro: (18, 0, 4)
    if problems:
        detail, remedy = "; ".join(p.detail for p in problems), "; ".join(p.remedy for p in problems)
        return CheckResult("database", False, detail, remedy)
    return CheckResult("database", True, f"PostgreSQL {version.major}.{version.micro} keeps what it commits")


async def generations(context: CheckContext) -> CheckResult:
    """Check that this is no older copy of the database."""
    missing = await identity.missing(context.conn, context.settings.data_dir)
    if not missing:
        return CheckResult("database copy", True, "has every generation that its daemons added")
    generations = ", ".join(f"{generation.generation} (added by {generation.host})" for generation in missing)
    detail = f"an older copy: it lacks generation {generations}. Requests with tokens that it does not know receive 503"
    return CheckResult("database copy", False, detail, "nexhb database accept")


async def clocks(context: CheckContext) -> CheckResult:
    """Check the clocks of this host, the database and the devices."""
    apart = clock.system_now() - (await clock.read(context.conn))[0]
    row = await context.conn.fetchrow(_Q["ahead"], MAX_AHEAD)
    assert row is not None  # noqa: S101 - an aggregate has one row
    seconds = round(apart.total_seconds())
    if reason := clock.apart_because(apart):
        return CheckResult("clock", False, reason, "timedatectl, here and on the database's host")
    if row["devices"]:
        detail = (
            f"the last heartbeat of {row['devices']} devices is in the future, "
            f"of {row['device_id']} at {shown_time(row['heard_at'])}"
        )
        remedy = "set the clock of the database's host; the devices' next heartbeats correct the rest"
        return CheckResult("clock", False, detail, remedy)
    return CheckResult("clock", True, f"{abs(seconds)} s {'behind' if seconds < 0 else 'ahead of'} the database's")


async def schema(context: CheckContext) -> CheckResult:
    """Check that the migrations are those of this nexhb."""
    applied, known = await migrate.schema_versions(context.conn)
    remedy = "install the nexhb that applied it, or a newer version" if applied > known else "run nexhb migrate"
    detail = f"at migration {applied} of {known}" if applied else "this database has no tables of nexhb"
    return CheckResult("schema", applied == known, detail, remedy)


async def dangling_numbers(context: CheckContext) -> CheckResult:
    """Check that rows refer to existing devices and labels, and that no number would be issued twice."""
    dangling = numbers.Dangling(await numbers.dangling_statuses(context.conn), 0)
    dangling += await numbers.dangling_late(
        context.conn, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    )
    today = partitions.table_name(context.now.date())
    rows = await context.conn.fetchval(_Q["rows"], partitions.quoted(today))
    if rows is not None:
        dangling += await numbers.dangling_in_sample(context.conn, partitions.quoted(today), rows)
    if dangling.devices or dangling.labels:
        detail = f"{dangling.devices} rows of today refer to a missing device, {dangling.labels} to a missing label"
        return CheckResult(
            "numbers", False, detail, f"nexhb audit --day {context.now.date()}, and docs/runbook.md#rows-dangle"
        )
    if behind := await numbers.lagging_sequences(context.conn):
        detail = "; ".join(
            f"the next {row['what']} would get number {row['given'] + 1}, although {row['used']} is in use"
            for row in behind
        )
        return CheckResult("numbers", False, detail, "nexhb reconcile or a restart: both raise the sequences")
    return CheckResult("numbers", True, "no row refers to a missing device or label")


async def held_locks(context: CheckContext) -> CheckResult:
    """Check that no session holds a lock for too long."""
    rows = await context.conn.fetch(_Q["lock_holders"], int(min(Lock)), int(max(Lock)))
    others = await context.conn.fetch(_Q["holding_up"], MAX_FOREIGN_LOCK_S)
    held = [f"{Lock(row['lock']).name.lower()} by {_session(row)}" for row in rows]
    held += [f"heartbeats or jobs wait for {_session(row)}" for row in others]
    stuck = [row["pid"] for row in rows if row["seconds"] > _max_lock_s(row)] + [row["pid"] for row in others]
    remedies = [f"SELECT pg_terminate_backend({pid})" for pid in dict.fromkeys(stuck)]
    for row in await context.conn.fetch(_Q["prepared"], MAX_FOREIGN_LOCK_S):
        held.append(f"the prepared transaction {row['gid']} holds tables for {row['seconds']} s")
        remedies.append("COMMIT PREPARED or ROLLBACK PREPARED '" + row["gid"].replace("'", "''") + "'")
    return CheckResult(
        "locks",
        not remedies,
        ", ".join(held) or "no session holds one of nexhb's locks, or a lock for which heartbeats or jobs wait",
        "; ".join(remedies),
    )


def _max_lock_s(row: Record) -> int:
    return MAX_LOCK_S if (row["application_name"] or "").startswith("nexhb") else MAX_FOREIGN_LOCK_S


def _session(row: Record) -> str:
    who = f"{row['application_name'] or 'unnamed'}, {row['state'] or 'state not visible'}"
    return f"pid {row['pid']} ({who}) for {row['seconds']} s"


async def hot_updates(context: CheckContext) -> CheckResult:
    """Check that most updates of device_last_status change no index."""
    row = await context.conn.fetchrow(_Q["hot"])
    if row is None or row["updates"] < MIN_HOT_UPDATES:
        return CheckResult("HOT updates", True, "too few updates to judge")
    share = row["hot"] / row["updates"]
    return CheckResult(
        "HOT updates", share >= MIN_HOT_SHARE, f"{share:.0%} of device_last_status", "VACUUM FULL device_last_status"
    )
