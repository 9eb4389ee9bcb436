"""A day back out of its archive: into a table of its own, into the partition that it was, or as a drill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import asyncpg

from nexhb import log, partitions, sql
from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.export import select
from nexhb.archive.manifest import STREAM_COLUMNS, Manifest
from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged, BadInput, DayAttached
from nexhb.partitions import quoted

_Q = sql.queries("archive")
_log = log.get("archive")


@dataclass(frozen=True)
class _Table:
    """A table that an archive is read into."""

    table: str
    schema: str | None = None

    @property
    def qualified(self) -> str:
        return f"{self.schema}.{quoted(self.table)}" if self.schema else quoted(self.table)


_PACKED = _Table("nexhb_packed", "pg_temp")
_SCRATCH = _Table("nexhb_restore", "pg_temp")  # a temporary table: a restore that is killed leaves nothing


async def restore_into(
    conn: Connection, store: Store, archives: Sequence[Archived], table: str, spool: Path | None = None
) -> int:
    """Make `table`, with the archive's columns, out of `archives`; how many rows. All of it or nothing.

    Raises ArchiveDamaged, StoreError, or BadInput where the table is there already.
    """
    try:
        async with conn.transaction():
            return await _fill(conn, store, archives, _Table(table), spool)
    except asyncpg.DuplicateTableError as error:
        raise BadInput(f"There is a table {table} already.", hint="Name another.") from error


async def restore_day(
    conn: Connection, store: Store, archives: Sequence[Archived], now: datetime, spool: Path | None = None
) -> int:
    """Attach the day again, with the rows of its archive and of its supplements; how many. All of it or nothing.

    It is marked as restored, and not archived again until it is released. A day whose table is still there, detached,
    is attached as it is: its supplements, if any, were brought into it by the restore before. Raises ArchiveDamaged,
    StoreError, or BadInput where it is attached or somebody's own table has its name.
    """
    day = archives[0]
    attached = await partitions.attached(conn)
    if any(p.start < day.end and p.end > day.start for p in attached):
        raise DayAttached(f"{day.partition} is attached: there is nothing to restore.")
    async with conn.transaction():
        await conn.execute("SET LOCAL lock_timeout = '30s'")
        if not await partitions.present(conn, day.partition):
            await partitions.create(conn, day.partition)
            rows = await _bring_back(conn, store, archives, day.partition, spool)
        elif day.state == "dropped":
            raise BadInput(f"There is a table {day.partition}, and it is not the day's.", hint="Rename it.")
        else:
            await partitions.unseal(conn, day.partition)
            rows = await partitions.count(conn, day.partition)
        await conn.execute(partitions.attach_statement(day.partition, day.start, day.end))
        await conn.execute(_Q["restored"], day.partition, now)
    _log.info("archive.restored", partition=day.partition, rows=rows)
    return rows


async def _bring_back(
    conn: Connection, store: Store, archives: Sequence[Archived], table: str, spool: Path | None
) -> int:
    scratch = _SCRATCH.qualified
    rows = await _fill(conn, store, archives, _SCRATCH, spool)
    await conn.execute(_Q["restore_devices"].replace("$table", scratch))
    await conn.execute(_Q["restore_strangers"].replace("$table", scratch))
    await conn.execute(_Q["restore_labels"].replace("$table", scratch))
    done = await conn.execute(_Q["restore_rows"].replace("$table", quoted(table)).replace("$plain", scratch))
    if int(done.rpartition(" ")[2]) != rows:
        raise ArchiveDamaged(f"{rows} rows were read, and {done} of them stored.")
    await conn.execute(f"DROP TABLE {scratch}")
    return rows


async def _fill(conn: Connection, store: Store, archives: Sequence[Archived], into: _Table, spool: Path | None) -> int:
    """A plain table out of archives, each compared with its manifest on the way."""
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
    """Restore an archive into a scratch table, compare it with its manifest, drop it; how many rows.

    What is compared is the table written out again, byte by byte: an archive that is whole and yet cannot be loaded,
    or loads as something else, is no archive. Raises ArchiveDamaged, StoreError, or what the database says.
    """
    scratch = _SCRATCH.qualified
    await conn.execute(_Q["session"])
    async with conn.transaction():
        rows = await _fill(conn, store, [archived], _SCRATCH, spool)
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        again = hashlib.sha256()

        async def take(piece: bytes) -> None:
            again.update(piece)

        again_as = _Q["plain_again"].replace("$table", scratch)
        if manifest.bucket_seconds is not None:
            again_as = select(scratch, manifest.bucket_seconds)
        await conn.copy_from_query(again_as, output=take, format="csv", header=True, encoding="utf-8")
        span = await conn.fetchrow(_Q["span"].replace("$table", scratch))
        await conn.execute(f"DROP TABLE {scratch}")
    assert span is not None  # noqa: S101 - an aggregate has one row
    if again.hexdigest() != manifest.stream_sha256 or (span["min_ts"], span["max_ts"]) != (
        manifest.min_ts,
        manifest.max_ts,
    ):
        raise ArchiveDamaged(f"{archived.partition}, restored, is not what was archived.")
    return rows
