"""The days of device_heartbeats: read from the catalog, made ahead, each known to hb_partitions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from nexhb import log, metrics, sql
from nexhb.db import Connection
from nexhb.locks import Lock
from nexhb.pgerrors import Kind, classify

_Q = sql.queries("partitions")
_LOCK_SQL = sql.queries("locks")["transaction_lock"]
_log = log.get("partitions")

PARENT = "device_heartbeats"
LOCK_TIMEOUT_MS = 2_000  # longest that a DDL statement waits, and so the longest that ingest waits behind it
_BOUNDS = re.compile(r"FOR VALUES FROM \('([^']+)'\) TO \('([^']+)'\)")


@dataclass(frozen=True)
class Partition:
    """One attached day, as the catalog has it."""

    name: str
    start: datetime
    end: datetime
    detach_pending: bool = False

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


async def attached(conn: Connection) -> list[Partition]:
    """The attached partitions. A bound that cannot be read (somebody's own table) is logged and left alone."""
    found: list[Partition] = []
    for row in await conn.fetch(_Q["attached"]):
        match = _BOUNDS.fullmatch(row["bounds"] or "")
        if not match:
            _log.warning("partition.unreadable_bounds", partition=row["name"], bounds=row["bounds"])
            continue
        start, end = (datetime.fromisoformat(text) for text in match.groups())
        found.append(Partition(row["name"], _utc(start), _utc(end), row["detach_pending"]))
    return found


def _utc(moment: datetime) -> datetime:
    # The session's time zone is UTC, so a bound prints with +00; anything else would be a bug here.
    if moment.tzinfo is None:
        raise ValueError(f"a bound without a zone: {moment}")
    return moment.astimezone(UTC)


async def ensure(conn: Connection, days: list[date]) -> dict[date, str]:
    """Make the partitions of `days` that are missing; day → table name, for each of them.

    `conn` must not be in a transaction. Each day is a transaction of its own, tried again where a lock is busy.
    Raises the last error where a day could not be made.
    """
    tables = _by_day(await attached(conn), days)
    for day in days:
        if day not in tables:
            tables[day] = await _make_patiently(conn, day)
    return tables


def _by_day(partitions: list[Partition], days: list[date]) -> dict[date, str]:
    return {day: p.name for day in days for p in partitions if p.covers(day) and not p.detach_pending}


async def _make_patiently(conn: Connection, day: date) -> str:
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda e: classify(e) is Kind.TRANSIENT),
        stop=stop_after_attempt(5),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        reraise=True,
    )
    try:
        return str(await retrying(_make, conn, day))
    except Exception:
        metrics.partition_create_failures.inc()
        _log.exception("partition.create_failed", partition=name_of(day))
        raise


async def _make(conn: Connection, day: date) -> str:
    """CREATE … PARTITION OF would lock the parent against all ingest; a table made beside it and then attached takes
    SHARE UPDATE EXCLUSIVE, which ingest does not notice. It is empty, so ATTACH has nothing to scan."""
    name, start, end = name_of(day), midnight(day), midnight(day + timedelta(days=1))
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        await conn.execute(_LOCK_SQL, int(Lock.PARTITIONS))
        # Somebody else may have made it while we waited for the lock.
        if present := _by_day(await attached(conn), [day]).get(day):
            return present
        await conn.execute(_create_statement(name, start, end))
        await conn.execute(_Q["record"], name, start, end)
    metrics.partitions_created.inc()
    _log.info("partition.create", partition=name, range_start=start.isoformat(), range_end=end.isoformat())
    return name


def _create_statement(name: str, start: datetime, end: datetime) -> str:
    """DDL from a day's own name and bounds; explicit UTC literals, whatever the session's zone."""
    low, high = (f"'{moment:%Y-%m-%d %H:%M:%S}+00'" for moment in (start, end))
    return f"""
        CREATE TABLE {name} (LIKE {PARENT} INCLUDING ALL);
        CREATE UNIQUE INDEX {name}_key ON {name} (device_no, bucket);
        ALTER TABLE {PARENT} ATTACH PARTITION {name} FOR VALUES FROM ({low}) TO ({high});
    """


async def known(conn: Connection) -> list[asyncpg.Record]:
    """The rows of hb_partitions with the tables' present sizes, newest first."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["known"])
    return rows
