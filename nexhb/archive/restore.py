"""Restore a day from its archive: into a new table, again as the day's partition, or only as a trial (drill)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import asyncpg

from nexhb import log, partitions, retirement
from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.export import select
from nexhb.archive.manifest import STREAM_COLUMNS, Manifest, added_to
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged, BadInput, DayAttached
from nexhb.partitions import quoted
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("archive")
_log = log.get("archive")


@dataclass(frozen=True)
class _Table:
    """A table that an archive is loaded into."""

    table: str
    schema: str | None = None

    @property
    def qualified(self) -> str:
        return f"{self.schema}.{quoted(self.table)}" if self.schema else quoted(self.table)


_PACKED = _Table("nexhb_packed", "pg_temp")
_SCRATCH = _Table("nexhb_restore", "pg_temp")  # a temporary table, so that a killed restore leaves nothing


async def restore_into(
    conn: Connection, store: Store, archives: Sequence[Archived], table: str, spool: Path | None = None
) -> int:
    """Create `table` with the rows and columns of `archives`, in one transaction. Return the number of rows.

    Raises ArchiveDamaged, StoreError, or BadInput if `table` exists already.
    """
    try:
        async with conn.transaction():
            return await _fill(conn, store, archives, _Table(table), spool)
    except asyncpg.DuplicateTableError as error:
        raise BadInput(f"The table {table} already exists.", hint="Choose another name.") from error


async def restore_day(
    conn: Connection, store: Store, archives: Sequence[Archived], now: datetime, spool: Path | None = None
) -> int:
    """Attach the day again with the rows of its archive and supplements, in one transaction. Return the number of rows.

    The day is marked as restored and is not archived again until it is released. If the day's table still exists, but
    is detached, this table is attached unchanged: an earlier restore has merged any supplements into it.
    Raises ArchiveDamaged, StoreError, DayAttached, or BadInput if a table that nexhb did not create has the day's name.
    """
    day = archives[0]
    attached = await partitions.attached(conn)
    if any(p.start < day.end and p.end > day.start for p in attached):
        raise DayAttached(f"{day.partition} is attached; there is nothing to restore.")
    async with conn.transaction():
        await conn.execute("SET LOCAL lock_timeout = '30s'")
        if not await partitions.table_exists(conn, day.partition):
            await partitions.create(conn, day.partition)
            rows = await _load_day(conn, store, archives, day.partition, spool)
        elif day.state == "dropped":
            raise BadInput(f"The table {day.partition} exists, but it is not the day's.", hint="Rename it.")
        else:
            await retirement.unseal(conn, day.partition)
            rows = await partitions.count_rows(conn, day.partition)
        await conn.execute(partitions.attach_statement(day.partition, day.start, day.end))
        await conn.execute(_Q["restored"], day.partition, now)
    _log.info("archive.restored", partition=day.partition, rows=rows)
    return rows


async def _load_day(
    conn: Connection, store: Store, archives: Sequence[Archived], table: str, spool: Path | None
) -> int:
    scratch = _SCRATCH.qualified
    rows = await _fill(conn, store, archives, _SCRATCH, spool)
    await conn.execute(_Q["restore_devices"].replace("$table", scratch))
    await conn.execute(_Q["restore_strangers"].replace("$table", scratch))
    await conn.execute(_Q["restore_labels"].replace("$table", scratch))
    status = await conn.execute(_Q["restore_rows"].replace("$table", quoted(table)).replace("$plain", scratch))
    if (stored := int(status.rpartition(" ")[2])) != rows:
        raise ArchiveDamaged(f"{rows} rows were read from the archive, but {stored} were stored.")
    await conn.execute(f"DROP TABLE {scratch}")
    return rows


async def _fill(conn: Connection, store: Store, archives: Sequence[Archived], into: _Table, spool: Path | None) -> int:
    """Create the plain table `into` from archives, and compare each archive with its manifest. Return the row count."""
    await conn.execute(_Q["make_plain"].replace("$table", into.qualified))
    rows = 0
    for archived in archives:
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        if manifest.bucket_seconds is None:
            rows += await _copy(conn, store, manifest, into, spool)
            continue
        await conn.execute(_Q["make_packed"])
        rows += await _copy(conn, store, manifest, _PACKED, spool)
        unpack = _Q["unpack"].replace("$plain", into.qualified).replace("$packed", _PACKED.qualified)
        unpack = unpack.replace("$added", added_to(manifest.columns))
        await conn.execute(unpack.replace("$bucket_seconds", str(manifest.bucket_seconds)))
        await conn.execute(f"DROP TABLE {_PACKED.qualified}")
    return rows


async def _copy(conn: Connection, store: Store, manifest: Manifest, into: _Table, spool: Path | None) -> int:
    async with aclosing(verify.stream(store, manifest, spool)) as pieces:
        status = await conn.copy_to_table(
            into.table,
            schema_name=into.schema,
            source=pieces,
            columns=STREAM_COLUMNS[manifest.format],
            format="csv",
            header=True,
            encoding="utf-8",
        )
    rows = int(status.rpartition(" ")[2])
    if rows != manifest.rows:
        raise ArchiveDamaged(f"{manifest.partition}: {rows} rows were restored of {manifest.rows}.")
    return rows


async def drill(conn: Connection, store: Store, archived: Archived, spool: Path | None = None) -> int:
    """Restore an archive into a temporary table, compare it with the manifest, and drop it. Return the number of rows.

    The table is exported again, and its bytes are compared with the archive: an archive whose bytes are intact, but
    which cannot be loaded or gives other rows, is worthless. Raises ArchiveDamaged, StoreError, or the database's
    error.
    """
    scratch = _SCRATCH.qualified
    await conn.execute(_Q["session"])
    async with conn.transaction():
        rows = await _fill(conn, store, [archived], _SCRATCH, spool)
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        digest = hashlib.sha256()

        async def update(piece: bytes) -> None:
            digest.update(piece)

        query = _Q["plain_again"].replace("$table", scratch).replace("$columns", ", ".join(manifest.columns))
        if manifest.bucket_seconds is not None:
            query = select(scratch, manifest.bucket_seconds, manifest.columns)
        await conn.copy_from_query(query, output=update, format="csv", header=True, encoding="utf-8")
        span = await conn.fetchrow(_Q["span"].replace("$table", scratch))
        await conn.execute(f"DROP TABLE {scratch}")
    assert span is not None  # noqa: S101 - an aggregate has one row
    if digest.hexdigest() != manifest.stream_sha256 or (span["min_ts"], span["max_ts"]) != (
        manifest.min_ts,
        manifest.max_ts,
    ):
        raise ArchiveDamaged(f"{archived.partition}, once restored, is not what was archived.")
    return rows
