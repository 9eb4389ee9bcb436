"""Archive the heartbeats that arrived after their day was archived, as a supplement of its archive."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Container
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from nexhb import log, retirement
from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.export import BUCKET_SECONDS, ArchivedTable, export
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("archive")
_log = log.get("archive")

MAX_KEYS = 200_000  # limit of keys held in memory (20 MB) while the day's archive is searched for them


async def store_supplement(
    conn: Connection,
    store: Store,
    archives: list[Archived],
    spool: Path,
    now: datetime,
    *,
    bucket_seconds: int = BUCKET_SECONDS,
    checkpoint: Callable[[str], None] = lambda _: None,
) -> int:
    """Move a day's late heartbeats into a new, verified supplement, and return its number of rows.

    `archives` are the day's archive and its supplements so far. Rows that these archives already have are left out:
    a device that got no response sends the same heartbeat again. Rows are deleted from late_heartbeats only after the
    supplement was read back from the store. Raises ArchiveDamaged or StoreError.
    """
    day = archives[0]
    waiting = await conn.fetch(_Q["late_keys"], day.start, day.end, MAX_KEYS)
    keys = [(row["device_no"], row["bucket"]) for row in waiting]
    heartbeats = [_key(row["device_id"], row["device_no"], row["bucket"]) for row in waiting]
    archived = await archived_keys(store, archives, set(heartbeats), spool)
    new = [key for key, heartbeat in zip(keys, heartbeats, strict=True) if heartbeat not in archived]
    await conn.execute(_Q["late_day"])
    await conn.execute(_Q["clear_late_day"])
    await conn.execute(_Q["fill_late_day"], *_columns(new))
    if not new:
        async with conn.transaction():
            await _forget(conn, day, keys, len(keys))
        return 0
    source = ArchivedTable("late_day", "late", day.partition, day.start, day.end)
    stored = await export(conn, source, store, spool, bucket_seconds=bucket_seconds, checkpoint=checkpoint)
    await verify.verify(store, stored.name, stored.sha256, spool)
    checkpoint("verified")
    async with conn.transaction():
        manifest, url = stored.manifest, store.url(stored.name)
        await conn.execute(_Q["add_supplement"], day.partition, url, stored.sha256, manifest.rows, manifest.bytes, now)
        await _forget(conn, day, keys, len(keys) - len(new))
    checkpoint("recorded")
    _log.info("archive.supplement", partition=day.partition, rows=manifest.rows, url=url)
    return manifest.rows


async def _forget(conn: Connection, day: Archived, keys: list[tuple[int, int]], duplicates: int) -> None:
    await conn.execute(_Q["forget_late"], *_columns(keys))
    await retirement.correct_ledger(conn, day.start.date(), duplicates)


HeartbeatKey = tuple[str, int]  # device_id and bucket, which identify a heartbeat in every database


def _key(device_id: str | None, device_no: int, bucket: int) -> HeartbeatKey:
    """Return a heartbeat's key. It contains the device's number if the device was deleted and has no id."""
    return device_id or f"\0{device_no}", bucket


async def archived_keys(
    store: Store, archives: list[Archived], keys: set[HeartbeatKey], spool: Path
) -> set[HeartbeatKey]:
    """Return which of `keys` the day's archives have. Raises ArchiveDamaged or StoreError."""
    archived_too: set[HeartbeatKey] = set()
    device_ids = {"", *(device_id for device_id, _ in keys)}
    for archived in archives:
        async with aclosing(_keys(store, archived, ("device_id", device_ids), spool)) as pieces:
            async for piece in pieces:
                archived_too |= keys & piece
    return archived_too


async def read_keys(store: Store, archived: Archived, spool: Path) -> set[HeartbeatKey]:
    """Return a supplement's keys. Raises StoreError, or ArchiveDamaged (also if there are more than MAX_KEYS rows)."""
    keys: set[HeartbeatKey] = set()
    async with aclosing(_keys(store, archived, None, spool)) as pieces:
        async for piece in pieces:
            keys |= piece
            if len(keys) > MAX_KEYS:
                raise ArchiveDamaged(f"{archived.url} has more than {MAX_KEYS:,} rows.")
    return keys


async def _keys(
    store: Store, archived: Archived, where: tuple[str, Container[str]] | None, spool: Path
) -> AsyncGenerator[set[HeartbeatKey], None]:
    manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
    async with aclosing(verify.rows(store, manifest, where, spool)) as pieces:
        async for rows in pieces:
            try:
                yield {_key(row[0], int(row[-2]), int(row[-1])) for row in rows}
            except ValueError as error:
                raise ArchiveDamaged(f"{archived.url} has an unreadable row: {error}.") from error


def _columns(keys: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [device_no for device_no, _ in keys], [bucket for _, bucket in keys]
