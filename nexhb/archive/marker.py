"""The marker of an archive store: an object whose name the database knows. A store without it is another one: a folder
that is not mounted, a bucket that was emptied, a wrong prefix or endpoint."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from nexhb import log, sql
from nexhb.archive import verify
from nexhb.archive.export import put, spooled
from nexhb.archive.store import Store
from nexhb.db import Connection
from nexhb.errors import ArchiveDamaged, BadInput, ObjectMissing, StoreError, WrongStore

_Q = sql.queries("archive")
_log = log.get("archive")

PREFIX = "nexhb-archive-"
CONTENT = (
    b"By the name of this object nexhb knows its archive. Without it nothing is archived here, and nothing dropped.\n"
)
LOOKED_FOR = 5  # archives of which one must be there before a store without a marker gets one
HINT = (
    "Mount it, or correct archive.url; if the archive was moved there, or is to begin anew there: "
    "`nexhb archive adopt`."
)


def place_of(store: Store) -> str:
    """The store's url, up to the names of its objects."""
    return store.url(PREFIX).removesuffix(PREFIX)


async def ensure(conn: Connection, store: Store, spool: Path, now: datetime) -> None:
    """Raise WrongStore unless the store has the marker that the database knows. The first time it gets one: a store
    of which the database knows archives only if one of them is there."""
    place = place_of(store)
    row = await conn.fetchrow(_Q["marker"], place)
    if row is not None:
        if not await _is_there(store, row["marker"]):
            raise WrongStore(
                f"{place} lacks the marker {row['marker']}, which was put there {row['marked_at']:%Y-%m-%d}.", hint=HINT
            )
        return
    archives = await conn.fetch(_Q["archives_at"], place, LOOKED_FOR)
    if archives and not await _any_is_there(store, [(row["archive_url"], row["checksum_sha256"]) for row in archives]):
        raise WrongStore(f"{place} has none of the last {len(archives)} archives that were stored there.", hint=HINT)
    await mark(conn, store, spool, now)


async def is_right(conn: Connection, store: Store) -> bool:
    """Whether the store has the marker that the database knows, or the database knows none (yet). Raises StoreError."""
    row = await conn.fetchrow(_Q["marker"], place_of(store))
    return row is None or await _is_there(store, row["marker"])


async def mark(conn: Connection, store: Store, spool: Path, now: datetime) -> None:
    """Put a new marker into the store, which is the right one from now on."""
    place, name = place_of(store), PREFIX + secrets.token_hex(8)
    async with spooled(spool) as file:
        file.write(CONTENT)
        file.flush()
        await put(store, name, Path(file.name), hashlib.sha256(CONTENT).digest())
    await conn.execute(_Q["set_marker"], place, name, now)
    _log.info("archive.marked", place=place, marker=name)


async def accept(
    conn: Connection, store: Store, names: set[str], spool: Path, now: datetime, *, force: bool, dry_run: bool
) -> bool:
    """Take the store, which has objects of these names, for the right one from now on; whether it was not yet. Raises
    BadInput where the database knows archives there, none of which is there, unless `force`."""
    place = place_of(store)
    row = await conn.fetchrow(_Q["marker"], place)
    if row is not None and await _is_there(store, row["marker"]):
        return False
    urls = [one["archive_url"] for one in await conn.fetch(_Q["archives_at"], place, None)]
    if urls and not force and not any(store.name_of(url) in names for url in urls):
        raise BadInput(
            f"{place} has none of the {len(urls)} archives that the database knows there.",
            hint="Mount it, or correct archive.url; with --force it begins anew, and those archives are lost.",
        )
    if not dry_run:
        await mark(conn, store, spool, now)
    return True


async def _is_there(store: Store, name: str) -> bool:
    """What is in it counts for nothing."""
    try:
        async with aclosing(store.get(name)) as chunks:
            async for _ in chunks:
                break
    except ObjectMissing:
        return False
    return True


async def _any_is_there(store: Store, archives: list[tuple[str, str]]) -> bool:
    for url, sha256 in archives:
        try:
            await verify.load(store, store.name_of(url), sha256)
        except (ArchiveDamaged, StoreError) as error:
            _log.warning("archive.not_there", url=url, reason=str(error))
        else:
            return True
    return False
