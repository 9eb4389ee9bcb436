"""What came after a day had been archived → a supplement of its archive."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from nexhb import log, partitions, sql
from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.export import BUCKET_SECONDS, Source, export
from nexhb.archive.store import Store
from nexhb.db import Connection

_Q = sql.queries("archive")
_log = log.get("archive")

KEYS_AT_ONCE = 200_000  # held in memory while the day's archive is searched for them: 20 MB


async def supplement(
    conn: Connection,
    store: Store,
    archives: list[Archived],
    spool: Path,
    now: datetime,
    *,
    bucket_seconds: int = BUCKET_SECONDS,
    at: Callable[[str], None] = lambda _: None,
) -> int:
    """Carry a day's late heartbeats into a supplement, verified; how many rows. `archives`: what the day has so far.

    Rows that one of them has already are left out: a device that was not answered sends again. Nothing leaves
    late_heartbeats before it was read back from the store. Raises ArchiveDamaged or StoreError.
    """
    day = archives[0]
    keys = [(row[0], row[1]) for row in await conn.fetch(_Q["late_keys"], day.start, day.end, KEYS_AT_ONCE)]
    known = await _known(store, archives, set(keys))
    new = [key for key in keys if key not in known]
    await conn.execute(_Q["late_day"])
    await conn.execute(_Q["clear_late_day"])
    await conn.execute(_Q["fill_late_day"], *_columns(new))
    if not new:
        async with conn.transaction():
            await _forget(conn, day, keys, len(keys))
        return 0
    source = Source("late_day", "late", day.partition, day.start, day.end)
    stored = await export(conn, source, store, spool, bucket_seconds=bucket_seconds, at=at)
    await verify.verify(store, stored.name, stored.sha256)
    at("verified")
    async with conn.transaction():
        manifest, url = stored.manifest, store.url(stored.name)
        await conn.execute(_Q["add_supplement"], day.partition, url, stored.sha256, manifest.rows, manifest.bytes, now)
        await _forget(conn, day, keys, len(keys) - len(new))
    at("recorded")
    _log.info("archive.supplement", partition=day.partition, rows=manifest.rows, url=url)
    return manifest.rows


async def _forget(conn: Connection, day: Archived, keys: list[tuple[int, int]], doubled: int) -> None:
    await conn.execute(_Q["forget_late"], *_columns(keys))
    await partitions.correct_ledger(conn, day.start.date(), doubled)


async def _known(store: Store, archives: list[Archived], keys: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those of `keys` that the day's archives have."""
    found: set[tuple[int, int]] = set()
    theirs = {str(device_no) for device_no, _ in keys}
    for archived in archives:
        manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
        async for rows in verify.rows(store, manifest, ("device_no", theirs)):
            found |= keys & {(int(row[-2]), int(row[-1])) for row in rows}
    return found


def _columns(keys: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [device_no for device_no, _ in keys], [bucket for _, bucket in keys]
