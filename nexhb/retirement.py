"""Take a day out of the history: detach its partition, seal its table, move late heartbeats into it, drop it.

When a restored day is attached again, register it and make it accept rows.
"""

from __future__ import annotations

from datetime import date, datetime

import asyncpg

from nexhb import log, metrics, partitions
from nexhb.errors import ArchiveDamaged, NexhbError, NotDetachable, PartitionBusy
from nexhb.heartbeat import HISTORY_COLUMNS as COLUMNS
from nexhb.partitions import PARENT, catalog_rows, count_rows, ddl, find_default, quoted, retry_while_locked, suffixed
from nexhb.postgres import locks, sql
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock, blocking_transactions

_Q = sql.queries("partitions")
_log = log.get("partitions")


async def detach(conn: Connection, name: str) -> None:
    """Detach a partition without blocking ingest, or finish an interrupted detach. Idempotent.

    `conn` must not be in a transaction, and must have a lock_timeout. Raises PartitionBusy, naming the blocking
    transactions, if others keep reading the parent; the detach then stays pending, and the next call finishes it.
    Raises NotDetachable if PostgreSQL refuses.
    """
    try:
        await retry_while_locked(_detach, conn, name)
    except asyncpg.LockNotAvailableError as error:
        raise PartitionBusy(f"{name} cannot be detached: {await blocking_transactions(conn)}.") from error


async def _detach(conn: Connection, name: str) -> None:
    # An interrupted detach stays pending or finishes by itself, so each attempt reads the state again.
    row = next((row for row in await catalog_rows(conn) if row["name"] == name), None)
    if row is None:
        return
    mode = "FINALIZE" if row["detach_pending"] else "CONCURRENTLY"
    await conn.execute(f"SET lock_timeout = {partitions.LOCK_TIMEOUT_MS}")
    try:
        await conn.execute(f"ALTER TABLE {PARENT} DETACH PARTITION {quoted(name)} {mode}")
    except asyncpg.LockNotAvailableError:  # before its base class, which is caught next
        raise
    except asyncpg.ObjectNotInPrerequisiteStateError as error:
        raise await _detach_error(conn, name, error) from error
    _log.info("partition.detach", partition=name, how=mode.lower())


async def _detach_error(conn: Connection, name: str, error: asyncpg.PostgresError) -> NexhbError:
    """Find the reason of a failed detach in the catalog: the SQLSTATE (55000) is the same for all reasons."""
    rows = await catalog_rows(conn)
    if pending := next((row["name"] for row in rows if row["detach_pending"]), None):
        return PartitionBusy(
            f"{name} cannot be detached while the detach of {pending} is pending.",
            hint="The next nightly run finishes it: nexhb nightly.",
        )
    if default := find_default(rows):
        return NotDetachable(
            f'{name} cannot be detached while {PARENT} has the DEFAULT partition "{default}".',
            hint=f"Run ALTER TABLE {PARENT} DETACH PARTITION {quoted(default)}; "
            "docs/runbook.md#nexhbarchivefailed explains how to move its rows back.",
        )
    return NotDetachable(f"{name}: {error}.")


async def seal(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    """Move the late heartbeats of a detached day into its table, then make it reject rows. Return how many were moved.

    Otherwise a writer that still has the table's name would add rows after the export, and the rows would be dropped
    with the table. The constraint is NOT VALID, so that PostgreSQL does not check the existing rows. Idempotent.
    """
    if await is_sealed(conn, name):
        return 0
    return await retry_while_locked(_seal, conn, name, start, end)


async def _seal(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    async with ddl(conn):
        # The lock waits for every transaction that has written; the constraint stops every later one.
        await conn.execute(f"LOCK TABLE {quoted(name)} IN ACCESS EXCLUSIVE MODE")
        merged = await _merge(conn, name, start, end)
        await conn.execute(f"ALTER TABLE {quoted(name)} ADD CONSTRAINT {_seal_of(name)} CHECK (false) NOT VALID")
    return merged


def _seal_of(name: str) -> str:
    """Return the name of the constraint that makes the table reject rows, quoted."""
    return quoted(suffixed(name, "_sealed"))


async def merge_late(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    """Move late heartbeats into their day's table, which accepts rows (again). Return how many were moved."""
    async with ddl(conn):
        return await _merge(conn, name, start, end)


async def _merge(conn: Connection, name: str, start: datetime, end: datetime) -> int:
    columns = ", ".join(COLUMNS)
    row = await conn.fetchrow(
        f"""WITH late AS (DELETE FROM late_heartbeats WHERE ts >= $1 AND ts < $2 RETURNING {columns}),
            merged AS (
                INSERT INTO {quoted(name)} ({columns}) SELECT {columns} FROM late ORDER BY device_no, bucket
                ON CONFLICT (device_no, bucket) DO NOTHING
                RETURNING 1)
            SELECT (SELECT count(*) FROM late) AS deleted, (SELECT count(*) FROM merged) AS merged""",  # noqa: S608 - a name out of the catalog, quoted
        start,
        end,
    )
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    await correct_ledger(conn, start.date(), row["deleted"] - row["merged"])
    return int(row["merged"])


async def correct_ledger(conn: Connection, day: date, duplicates: int) -> None:
    """Count `duplicates` late heartbeats as deduplicated instead of written."""
    if duplicates:
        await conn.execute(_Q["correct_ledger"], day, duplicates)


async def register(conn: Connection, name: str, start: datetime, end: datetime) -> None:
    """Record an attached partition in hb_partitions, and make it accept rows. Idempotent."""
    await retry_while_locked(_register, conn, name, start, end)


async def _register(conn: Connection, name: str, start: datetime, end: datetime) -> None:
    async with ddl(conn):
        if await is_sealed(conn, name):
            await unseal(conn, name)
        await conn.execute(_Q["register"], name, start, end)


async def is_sealed(conn: Connection, name: str) -> bool:
    """Return whether the table rejects new rows."""
    return bool(await conn.fetchval(_Q["is_sealed"], name))


async def unseal(conn: Connection, name: str) -> None:
    """Make a detached day's table accept rows again. Runs in the caller's transaction."""
    await conn.execute(f"ALTER TABLE {quoted(name)} DROP CONSTRAINT IF EXISTS {_seal_of(name)}")


async def drop(conn: Connection, name: str, now: datetime) -> None:
    """Drop the table of a day whose archive was verified: the only irreversible step.

    The drop needs the nightly lock, and is in one transaction with its record in hb_partitions. Raises ArchiveDamaged
    unless hb_partitions says that the day is archived, the table has as many rows as the archive, and it is sealed;
    LockLost if another process may hold the lock.
    """
    size = await retry_while_locked(_drop, conn, name, now)
    metrics.partitions_dropped.inc()
    _log.info("partition.drop", partition=name, bytes=size)


async def _drop(conn: Connection, name: str, now: datetime) -> int:
    async with ddl(conn):
        await locks.check(conn, Lock.NIGHTLY)
        row = await conn.fetchrow(_Q["state_for_drop"], name)
        if row is None or row["state"] != "archived" or await conn.fetchval(_Q["is_attached"], name):
            raise ArchiveDamaged(f"{name} is not archived and detached; it is not dropped.")
        await conn.execute(f"LOCK TABLE {quoted(name)} IN ACCESS EXCLUSIVE MODE")
        if not await is_sealed(conn, name):
            raise ArchiveDamaged(f"{name} accepted rows again after it was archived; it is not dropped.")
        rows = await count_rows(conn, name)
        if rows != row["row_count"]:
            raise ArchiveDamaged(f"{name} has {rows} rows, its archive {row['row_count']}; it is not dropped.")
        size = int(await conn.fetchval(_Q["size"], name))
        await conn.execute(f"DROP TABLE {quoted(name)}")
        await conn.execute(_Q["dropped"], name, now, size)
    return size
