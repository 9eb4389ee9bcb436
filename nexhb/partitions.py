"""The daily partitions of device_heartbeats: list them, create them ahead of time, vacuum them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TypeVar

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from nexhb import log, metrics
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.errors import Kind, classify
from nexhb.postgres.locks import Lock

_Q = sql.queries("partitions")
_LOCK_SQL = sql.queries("locks")["transaction_lock"]
_log = log.get("partitions")
T = TypeVar("T")

PARENT = "device_heartbeats"
LOCK_TIMEOUT_MS = 2_000  # the longest wait of a DDL statement for a lock; ingest may queue behind it
ATTEMPTS = 5
_BOUNDS = re.compile(r"FOR VALUES FROM \('([^']+)'\) TO \('([^']+)'\)")


@dataclass(frozen=True)
class Partition:
    """One attached partition, as PostgreSQL's catalog has it."""

    name: str
    start: datetime
    end: datetime
    detach_pending: bool = False
    sealed: bool = False  # attached by hand while sealed: it does not accept rows yet

    def covers(self, day: date) -> bool:
        """Return whether the partition contains the whole UTC day."""
        return self.start <= midnight(day) and midnight(day + timedelta(days=1)) <= self.end


def midnight(day: date) -> datetime:
    """Return the start of a UTC day."""
    return datetime.combine(day, time(), UTC)


def table_name(day: date) -> str:
    """Return the name of a new day's table."""
    return f"{PARENT}_{day:%Y%m%d}"


def days_between(first: date, last: date) -> list[date]:
    """Return every day from `first` to `last`, both included."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


async def catalog_rows(conn: Connection) -> list[asyncpg.Record]:
    """Return the attached partitions as PostgreSQL's catalog has them, also those that nexhb cannot interpret."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["attached"])
    return rows


async def attached(conn: Connection) -> list[Partition]:
    """Return the attached partitions. A partition with unreadable bounds, which nexhb did not create, is logged and
    skipped."""
    result: list[Partition] = []
    for row in await catalog_rows(conn):
        bounds = _bounds(row["bounds"] or "")
        if not bounds:
            _log.warning("partition.unreadable_bounds", partition=row["name"], bounds=row["bounds"])
            continue
        result.append(Partition(row["name"], *bounds, row["detach_pending"], row["sealed"]))
    return result


def _bounds(text: str) -> tuple[datetime, datetime] | None:
    """Parse the bounds; None if they are not two ordinary times: MINVALUE, infinity, a year BC."""
    match = _BOUNDS.fullmatch(text)
    try:
        start, end = (datetime.fromisoformat(bound) for bound in match.groups()) if match else (None, None)
    except ValueError:
        return None
    return (_utc(start), _utc(end)) if start and end else None


def _utc(moment: datetime) -> datetime:
    # The session's time zone is UTC, so a bound always has an offset of +00.
    if moment.tzinfo is None:
        raise ValueError(f"a bound without a time zone: {moment}")
    return moment.astimezone(UTC)


async def ensure(conn: Connection, days: list[date]) -> dict[date, str]:
    """Create the missing partitions of `days`. Return the table name of each day that has a partition now.

    A day that `reason_not_to_create` excludes is skipped: new rows would be missing from its archive. `conn` must not
    be in a transaction; each day is one transaction, retried while a lock is busy. Raises the last error if a day's
    partition could not be created.
    """
    tables = _by_day(await attached(conn), days)
    for day in days:
        if day not in tables and (created := await _create_with_retry(conn, day)):
            tables[day] = created
    return tables


def _by_day(partitions: list[Partition], days: list[date]) -> dict[date, str]:
    return {day: p.name for day in days for p in partitions if p.covers(day) and not p.detach_pending and not p.sealed}


async def days_ahead(conn: Connection, today: date) -> int:
    """Return how many days after `today` (UTC) have a partition, without a gap; -1 if today itself has none."""
    existing = await attached(conn)
    ahead, day = -1, today
    while any(p.covers(day) and not p.detach_pending for p in existing):
        ahead, day = ahead + 1, day + timedelta(days=1)
    return ahead


async def reason_not_to_create(conn: Connection, day: date) -> str | None:
    """Return why `day` must not get a partition: detached, archived, archive_failed or dropped. None if it may get
    one."""
    reason: str | None = await conn.fetchval(
        _Q["reason_not_to_create"], midnight(day), midnight(day + timedelta(days=1))
    )
    return reason


async def retry_while_locked(work: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run DDL, retrying while a lock is busy. Raises the last error if all attempts fail."""
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda e: classify(e) is Kind.TRANSIENT),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        reraise=True,
    )
    result: T = await retrying(work, *args)
    return result


async def _create_with_retry(conn: Connection, day: date) -> str | None:
    try:
        return await retry_while_locked(_create_day, conn, day)
    except Exception:
        metrics.partition_create_failures.inc()
        _log.exception("partition.create_failed", partition=table_name(day))
        raise


async def _create_day(conn: Connection, day: date) -> str | None:
    """Create the day's table and attach it.

    CREATE … PARTITION OF would lock out all ingest. Attaching a separate table takes SHARE UPDATE EXCLUSIVE, which does
    not block ingest, and the table is empty, so ATTACH has nothing to scan.
    """
    name, start, end = table_name(day), midnight(day), midnight(day + timedelta(days=1))
    async with ddl(conn):
        await conn.execute(_LOCK_SQL, int(Lock.PARTITIONS))
        # Another process may have created it during the wait for the lock.
        if present := _by_day(await attached(conn), [day]).get(day):
            return present
        if await reason_not_to_create(conn, day):
            return None
        await create(conn, name)
        await conn.execute(attach_statement(name, start, end))
        await conn.execute(_Q["register"], name, start, end)
    metrics.partitions_created.inc()
    _log.info("partition.create", partition=name, range_start=start.isoformat(), range_end=end.isoformat())
    return name


@asynccontextmanager
async def ddl(conn: Connection) -> AsyncIterator[None]:
    """Run the block in a transaction whose statements wait for a lock for LOCK_TIMEOUT_MS at most."""
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        yield


def quoted(name: str) -> str:
    """Quote a table's name for DDL."""
    return '"' + name.replace('"', '""') + '"'


def suffixed(name: str, suffix: str) -> str:
    """Append `suffix` to a table's name, shortened so that PostgreSQL does not cut the suffix off at 63 bytes."""
    return name.encode()[: 63 - len(suffix)].decode(errors="ignore") + suffix


async def create(conn: Connection, name: str) -> None:
    """Create a day's table, not attached, with its index, in the parent's tablespace. Runs in the caller's
    transaction."""
    await conn.execute(_Q["follow_tablespace"])
    await conn.execute(create_statement(name))


def create_statement(name: str) -> str:
    """Return the DDL of a day's table, which is not attached yet."""
    return f"""
        CREATE TABLE {quoted(name)} (LIKE {PARENT} INCLUDING ALL);
        CREATE UNIQUE INDEX {quoted(suffixed(name, "_key"))} ON {quoted(name)} (device_no, bucket);
    """


def attach_statement(name: str, start: datetime, end: datetime) -> str:
    """Return the DDL that attaches a table. Its literals are UTC, whatever the session's time zone."""
    low, high = (f"'{moment:%Y-%m-%d %H:%M:%S}+00'" for moment in (start, end))
    return f"ALTER TABLE {PARENT} ATTACH PARTITION {quoted(name)} FOR VALUES FROM ({low}) TO ({high})"


def find_default(rows: list[asyncpg.Record]) -> str | None:
    """Return the name of the DEFAULT partition among the rows of the catalog, or None."""
    return next((row["name"] for row in rows if row["bounds"] == "DEFAULT"), None)


async def default_partition(conn: Connection) -> str | None:
    """Return the name of the DEFAULT partition, or None. nexhb never creates one."""
    return find_default(await catalog_rows(conn))


async def fold_ledger(conn: Connection, before: date) -> None:
    """Merge the ledger's rows into one per day, for the days before `before`."""
    await conn.execute(_Q["fold_ledger"], before)


async def vacuum(conn: Connection, name: str, *, freeze: bool) -> None:
    """VACUUM ANALYZE one table. With `freeze`, freeze its rows, so that it needs no further vacuum."""
    await retry_while_locked(conn.execute, f"VACUUM ({'FREEZE, ' if freeze else ''}ANALYZE) {quoted(name)}")


async def analyze_parent(conn: Connection) -> None:
    """ANALYZE the partitioned table itself, which autovacuum never does."""
    only = "ONLY " if conn.get_server_version() >= (18,) else ""  # before 18, this reads every partition too
    await retry_while_locked(conn.execute, f"ANALYZE {only}{PARENT}")


async def table_exists(conn: Connection, name: str) -> bool:
    """Return whether a table of that name exists, attached or not."""
    return await conn.fetchval(_Q["size"], name) is not None


async def count_rows(conn: Connection, name: str) -> int:
    """Count the rows of a day's table."""
    return int(await conn.fetchval(f"SELECT count(*) FROM {quoted(name)}"))  # noqa: S608 - out of the catalog, quoted


async def recorded(conn: Connection) -> list[asyncpg.Record]:
    """Return the rows of hb_partitions with the tables' current sizes, newest first."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["recorded"])
    return rows
