"""What came after a day had been archived → a supplement of its archive."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Container
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from nexhb import log, partitions, sql
from nexhb.archive import verify
from nexhb.archive.catalog import Archived
from nexhb.archive.export import BUCKET_SECONDS, Source, export
from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged

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
    late = await conn.fetch(_Q["late_keys"], day.start, day.end, KEYS_AT_ONCE)
    keys = [(row["device_no"], row["bucket"]) for row in late]
    beats = [_beat(row["device_id"], row["device_no"], row["bucket"]) for row in late]
    there = await known(store, archives, set(beats), spool)
    new = [key for key, beat in zip(keys, beats, strict=True) if beat not in there]
    await conn.execute(_Q["late_day"])
    await conn.execute(_Q["clear_late_day"])
    await conn.execute(_Q["fill_late_day"], *_columns(new))
    if not new:
        async with conn.transaction():
            await _forget(conn, day, keys, len(keys))
        return 0
    source = Source("late_day", "late", day.partition, day.start, day.end)
    stored = await export(conn, source, store, spool, bucket_seconds=bucket_seconds, at=at)
    await verify.verify(store, stored.name, stored.sha256, spool)
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


Beat = tuple[str, int]  # a heartbeat as every database knows it: whose, and its bucket


def _beat(device_id: str | None, device_no: int, bucket: int) -> Beat:
    """Of a device that is gone only the number is known."""
    return device_id or f"\0{device_no}", bucket


async def known(store: Store, archives: list[Archived], beats: set[Beat], spool: Path) -> set[Beat]:
    """Those of `beats` that the day's archives have. Raises ArchiveDamaged or StoreError."""
    found: set[Beat] = set()
    theirs = {"", *(whose for whose, _ in beats)}
    for archived in archives:
        async with aclosing(_beats(store, archived, ("device_id", theirs), spool)) as pieces:
            async for piece in pieces:
                found |= beats & piece
    return found


async def beats_of(store: Store, archived: Archived, spool: Path) -> set[Beat]:
    """Those of a supplement. Raises ArchiveDamaged, for more than a supplement has too, or StoreError."""
    found: set[Beat] = set()
    async with aclosing(_beats(store, archived, None, spool)) as pieces:
        async for piece in pieces:
            found |= piece
            if len(found) > KEYS_AT_ONCE:
                raise ArchiveDamaged(f"{archived.url} has more than {KEYS_AT_ONCE:,} rows.")
    return found


async def _beats(
    store: Store, archived: Archived, where: tuple[str, Container[str]] | None, spool: Path
) -> AsyncGenerator[set[Beat], None]:
    manifest = await verify.load(store, store.name_of(archived.url), archived.sha256)
    async with aclosing(verify.rows(store, manifest, where, spool)) as pieces:
        async for rows in pieces:
            try:
                yield {_beat(row[0], int(row[-2]), int(row[-1])) for row in rows}
            except ValueError as error:
                raise ArchiveDamaged(f"{archived.url} has a row that cannot be read: {error}.") from error


def _columns(keys: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [device_no for device_no, _ in keys], [bucket for _, bucket in keys]
