"""The days of device_heartbeats: read from the catalog, made ahead, detached, sealed and dropped."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TypeVar

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from nexhb import locks, log, metrics, sql
from nexhb.batch import HISTORY_COLUMNS as COLUMNS
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged, NexhbError, NotDetachable, PartitionBusy
from nexhb.locks import Lock, in_the_way
from nexhb.pgerrors import Kind, classify

_Q = sql.queries("partitions")
_LOCK_SQL = sql.queries("locks")["transaction_lock"]
_log = log.get("partitions")
T = TypeVar("T")

PARENT = "device_heartbeats"
LOCK_TIMEOUT_MS = 2_000  # longest that a DDL statement waits, and so the longest that ingest waits behind it
ATTEMPTS = 5
_BOUNDS = re.compile(r"FOR VALUES FROM \('([^']+)'\) TO \('([^']+)'\)")


@dataclass(frozen=True)
class Partition:
    """One attached day, as the catalog has it."""

    name: str
    start: datetime
    end: datetime
    detach_pending: bool = False
    sealed: bool = False  # attached by hand behind its seal: it takes no rows yet

    def covers(self, day: date) -> bool:
        """True where the whole UTC day lies in its bounds."""
        return self.start <= midnight(day) and midnight(day + timedelta(days=1)) <= self.end


def midnight(day: date) -> datetime:
    """The start of a UTC day."""
    return datetime.combine(day, time(), UTC)


def name_of(day: date) -> str:
    """The name a new day's table gets."""
    return f"{PARENT}_{day:%Y%m%d}"


def days_between(first: date, last: date) -> list[date]:
    """Every day from `first` to `last`, both included."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


async def _in_catalog(conn: Connection) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await conn.fetch(_Q["attached"])
    return rows


async def attached(conn: Connection) -> list[Partition]:
    """The attached partitions. A bound that cannot be read (somebody's own table) is logged and left alone."""
    found: list[Partition] = []
    for row in await _in_catalog(conn):
        bounds = _bounds(row["bounds"] or "")
        if not bounds:
            _log.warning("partition.unreadable_bounds", partition=row["name"], bounds=row["bounds"])
            continue
        found.append(Partition(row["name"], *bounds, row["detach_pending"], row["sealed"]))
    return found


def _bounds(text: str) -> tuple[datetime, datetime] | None:
    """None for bounds that are no two times of ours: MINVALUE, infinity, a year BC."""
    match = _BOUNDS.fullmatch(text)
    try:
        start, end = (datetime.fromisoformat(bound) for bound in match.groups()) if match else (None, None)
    except ValueError:
        return None
    return (_utc(start), _utc(end)) if start and end else None


def _utc(moment: datetime) -> datetime:
    # The session's time zone is UTC, so a bound prints with +00; anything else would be a bug here.
    if moment.tzinfo is None:
        raise ValueError(f"a bound without a zone: {moment}")
    return moment.astimezone(UTC)


async def ensure(conn: Connection, days: list[date]) -> dict[date, str]:
    """Make the partitions of `days` that are missing; day → table name, for each that has one now.

    A day that is gone (see `gone`) is not made again: its rows would stand beside its archive. `conn` must not be in a
    transaction. Each day is a transaction of its own, tried again where a lock is busy. Raises the last error where a
    day could not be made.
    """
    tables = _by_day(await attached(conn), days)
    for day in days:
        if day not in tables and (made := await _make_patiently(conn, day)):
            tables[day] = made
    return tables


def _by_day(partitions: list[Partition], days: list[date]) -> dict[date, str]:
    return {day: p.name for day in days for p in partitions if p.covers(day) and not p.detach_pending and not p.sealed}


async def days_ahead(conn: Connection, today: date) -> int:
    """How many days behind `today` (UTC) have their partition, without a gap; -1 where today itself has none."""
    there = await attached(conn)
    ahead, day = -1, today
    while any(p.covers(day) and not p.detach_pending for p in there):
        ahead, day = ahead + 1, day + timedelta(days=1)
    return ahead


async def gone(conn: Connection, day: date) -> str | None:
    """Why no partition may be made for `day`: detached, archived, archive_failed or dropped; None where one may."""
    reason: str | None = await conn.fetchval(_Q["gone"], midnight(day), midnight(day + timedelta(days=1)))
    return reason


async def patiently(work: Callable[..., Awaitable[T]], *args: object) -> T:
    """DDL tried again where a lock is busy; the last error where it stays so."""
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda e: classify(e) is Kind.TRANSIENT),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        reraise=True,
    )
    result: T = await retrying(work, *args)
    return result


async def _make_patiently(conn: Connection, day: date) -> str | None:
    try:
        return await patiently(_make, conn, day)
    except Exception:
        metrics.partition_create_failures.inc()
        _log.exception("partition.create_failed", partition=name_of(day))
        raise


async def _make(conn: Connection, day: date) -> str | None:
    """CREATE … PARTITION OF would lock the parent against all ingest; a table made beside it and then attached takes
    SHARE UPDATE EXCLUSIVE, which ingest does not notice. It is empty, so ATTACH has nothing to scan."""
    name, start, end = name_of(day), midnight(day), midnight(day + timedelta(days=1))
    async with _ddl(conn):
        await conn.execute(_LOCK_SQL, int(Lock.PARTITIONS))
        # Somebody else may have made it while we waited for the lock.
        if present := _by_day(await attached(conn), [day]).get(day):
            return present
        if await gone(conn, day):
            return None
        await create(conn, name)
        await conn.execute(attach_statement(name, start, end))
        await conn.execute(_Q["record"], name, start, end)
    metrics.partitions_created.inc()
    _log.info("partition.create", partition=name, range_start=start.isoformat(), range_end=end.isoformat())
    return name


@asynccontextmanager
async def _ddl(conn: Connection) -> AsyncIterator[None]:
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        yield


def quoted(name: str) -> str:
    """A table's name out of the catalog, for DDL."""
    return '"' + name.replace('"', '""') + '"'


def _suffixed(name: str, suffix: str) -> str:
    """A name made of a table's that ends so still where PostgreSQL cuts it, at 63 bytes."""
    return name.encode()[: 63 - len(suffix)].decode(errors="ignore") + suffix


async def create(conn: Connection, name: str) -> None:
    """Make a day's table beside the parent, with its index in the parent's tablespace. Inside the caller's
    transaction."""
    await conn.execute(_Q["follow_tablespace"])
    await conn.execute(create_statement(name))


def create_statement(name: str) -> str:
    """A day's table, beside the parent."""
    return f"""
        CREATE TABLE {quoted(name)} (LIKE {PARENT} INCLUDING ALL);
        CREATE UNIQUE INDEX {quoted(_suffixed(name, "_key"))} ON {quoted(name)} (device_no, bucket);
    """


def attach_statement(name: str, start: datetime, end: datetime) -> str:
    """Explicit UTC literals, whatever the session's zone."""
    low, high = (f"'{moment:%Y-%m-%d %H:%M:%S}+00'" for moment in (start, end))
    return f"ALTER TABLE {PARENT} ATTACH PARTITION {quoted(name)} FOR VALUES FROM ({low}) TO ({high})"


# ---- the way out ----------------------------------------------------------------------------------------------------


async def detach(conn: Connection, name: str) -> None:
    """Detach a partition without holding up ingest, or finish a detach that was interrupted. Idempotent.

    `conn` must not be in a transaction, and must have a lock_timeout. Raises PartitionBusy, with who is in the way,
    where somebody reads the parent all the while; the detach then stays pending, and the next call finishes it. Raises
    NotDetachable where PostgreSQL refuses it.
    """
    try:
        await patiently(_detach, conn, name)
    except asyncpg.LockNotAvailableError as error:
        raise PartitionBusy(f"{name} cannot be detached: {await in_the_way(conn)}.") from error


async def _detach(conn: Connection, name: str) -> None:
    # Interrupted, a detach stays pending or finishes by itself: what is so is read anew for each try.
    found = next((p for p in await _in_catalog(conn) if p["name"] == name), None)
    if found is None:
        return
    how = "FINALIZE" if found["detach_pending"] else "CONCURRENTLY"
    await conn.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}")
    try:
        await conn.execute(f"ALTER TABLE {PARENT} DETACH PARTITION {quoted(name)} {how}")
    except asyncpg.LockNotAvailableError:  # a subclass of the next
        raise
    except asyncpg.ObjectNotInPrerequisiteStateError as error:
        raise await _why_not(conn, name, error) from error
    _log.info("partition.detach", partition=name, how=how.lower())


async def _why_not(conn: Connection, name: str, error: asyncpg.PostgresError) -> NexhbError:
    """What stands against a detach, as the catalog has it: the SQLSTATE (55000) is the same for all of it."""
    rows = await _in_catalog(conn)
    if pending := next((row["name"] for row in rows if row["detach_pending"]), None):
        return PartitionBusy(
            f"{name} cannot be detached while the detach of {pending} is pending.",
            hint="The next nightly run finishes it: nexhb nightly.",
        )
    if default := default_of(rows):
        return NotDetachable(
            f"{name} cannot be detached while {PARENT} has the DEFAULT partition {default}.",
            hint=f"Run ALTER TABLE {PARENT} DETACH PARTITION {quoted(default)}; "
            "docs/runbook.md#nexhbarchivefailed says how its rows come back.",
        )
    return NotDetachable(f"{name}: {error}.")


def default_of(rows: list[asyncpg.Record]) -> str | None:
    """The name of the DEFAULT partition among the rows of the catalog."""
    return next((row["name"] for row in rows if row["bounds"] == "DEFAULT"), None)


async def default_partition(conn: Connection) -> str | None:
    """The name of the DEFAULT partition: somebody's, since nexhb makes none."""
    return default_of(await _in_catalog(conn))


async def seal(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    """Bring the late heartbeats of a detached day into its table, then admit no more rows; how many came in.

    A writer that still knows the table's name would otherwise add rows to it behind the archive's back, and they would
    be dropped. NOT VALID: the rows that are there are not looked at. Idempotent.
    """
    if await is_sealed(conn, name):
        return 0
    return await patiently(_seal, conn, name, start, end)


async def _seal(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    async with _ddl(conn):
        # The lock waits for every writer that has begun; the constraint meets every one that comes.
        await conn.execute(f"LOCK TABLE {quoted(name)} IN ACCESS EXCLUSIVE MODE")
        merged = await _merge(conn, name, start, end)
        await conn.execute(
            f"ALTER TABLE {quoted(name)} ADD CONSTRAINT {quoted(_suffixed(name, '_sealed'))} CHECK (false) NOT VALID"
        )
    return merged


async def merge_late(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    """Bring late heartbeats into their day's table, which takes rows (again); how many were taken in."""
    async with _ddl(conn):
        return await _merge(conn, name, start, end)


async def _merge(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    columns = ", ".join(COLUMNS)
    row = await conn.fetchrow(
        f"""WITH late AS (DELETE FROM late_heartbeats WHERE ts >= $1 AND ts < $2 RETURNING {columns}),
            merged AS (
                INSERT INTO {quoted(name)} ({columns}) SELECT {columns} FROM late ORDER BY device_no, bucket
                ON CONFLICT (device_no, bucket) DO NOTHING
                RETURNING 1)
            SELECT (SELECT count(*) FROM late) AS taken, (SELECT count(*) FROM merged) AS merged""",  # noqa: S608 - a name out of the catalog, quoted
        start,
        end,
    )
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    await correct_ledger(conn, start.date(), row["taken"] - row["merged"])
    return int(row["merged"])


async def correct_ledger(conn: Connection, day: date, doubled: int) -> None:
    """Late heartbeats that were counted as written, and turn out to have been there already."""
    if doubled:
        await conn.execute(_Q["correct_ledger"], day, doubled)


async def fold_ledger(conn: Connection, before: date) -> None:
    """One row a day of the ledger, for the days before."""
    await conn.execute(_Q["fold_ledger"], before)


async def adopt(conn: Connection, name: str, start: datetime, end: datetime) -> None:
    """Write down an attached partition as the catalog has it, and let it take rows. Idempotent."""
    await patiently(_adopt, conn, name, start, end)


async def _adopt(conn: Connection, name: str, start: datetime, end: datetime) -> None:
    async with _ddl(conn):
        if await is_sealed(conn, name):
            await unseal(conn, name)
        await conn.execute(_Q["record"], name, start, end)


async def is_sealed(conn: Connection, name: str) -> bool:
    """Whether the table admits no rows."""
    return bool(await conn.fetchval(_Q["is_sealed"], name))


async def unseal(conn: Connection, name: str) -> None:
    """Let a detached day's table take rows again. Inside the caller's transaction."""
    await conn.execute(f"ALTER TABLE {quoted(name)} DROP CONSTRAINT IF EXISTS {quoted(_suffixed(name, '_sealed'))}")


async def drop(conn: Connection, name: str, now: datetime) -> None:
    """Drop the table of a day whose archive was read back and found whole: the one step that cannot be taken back.

    Under the nightly lock, in one transaction with its record. Raises ArchiveDamaged unless hb_partitions says that it
    is archived, the table has exactly the rows of the archive, and its seal is whole; LockLost where somebody else may
    be at work.
    """
    size = await patiently(_drop, conn, name, now)
    metrics.partitions_dropped.inc()
    _log.info("partition.drop", partition=name, bytes=size)


async def _drop(conn: Connection, name: str, now: datetime) -> int:
    async with _ddl(conn):
        await locks.check(conn, Lock.NIGHTLY)
        row = await conn.fetchrow(_Q["state_for_drop"], name)
        if row is None or row["state"] != "archived" or await conn.fetchval(_Q["is_attached"], name):
            raise ArchiveDamaged(f"{name} is not archived and detached: it is not dropped.")
        await conn.execute(f"LOCK TABLE {quoted(name)} IN ACCESS EXCLUSIVE MODE")
        if not await is_sealed(conn, name):
            raise ArchiveDamaged(f"{name} took rows again after it was archived: it is not dropped.")
        rows = await count(conn, name)
        if rows != row["row_count"]:
            raise ArchiveDamaged(f"{name} has {rows} rows, its archive {row['row_count']}: it is not dropped.")
        size = int(await conn.fetchval(_Q["size"], name))
        await conn.execute(f"DROP TABLE {quoted(name)}")
        await conn.execute(_Q["dropped"], name, now, size)
    return size


async def vacuum(conn: Connection, name: str, *, freeze: bool) -> None:
    """VACUUM ANALYZE one table; with `freeze`, once and for all."""
    await patiently(conn.execute, f"VACUUM ({'FREEZE, ' if freeze else ''}ANALYZE) {quoted(name)}")


async def analyze_parent(conn: Connection) -> None:
    """ANALYZE the partitioned table itself, which nothing does by itself."""
    only = "ONLY " if conn.get_server_version() >= (18,) else ""  # before 18, it reads every partition along the way
    await patiently(conn.execute, f"ANALYZE {only}{PARENT}")


async def present(conn: Connection, name: str) -> bool:
    """Whether there is a table of that name, attached or not."""
    return await conn.fetchval(_Q["size"], name) is not None


async def count(conn: Connection, name: str) -> int:
    """The rows of a day's table, counted."""
    return int(await conn.fetchval(f"SELECT count(*) FROM {quoted(name)}"))  # noqa: S608 - out of the catalog, quoted


async def known(conn: Connection) -> list[asyncpg.Record]:
    """The rows of hb_partitions with the tables' present sizes, newest first."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["known"])
    return rows
