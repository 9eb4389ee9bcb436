"""The marker of an archive store: an object whose name the database knows.

A store without the marker is not the expected store, but a folder that is not mounted, an emptied bucket, or a wrong
prefix or endpoint.
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from nexhb import log
from nexhb.archive import verify
from nexhb.archive.export import put, spooled
from nexhb.archive.store import Store
from nexhb.errors import ArchiveDamaged, BadInput, ObjectMissing, StoreError, WrongStore
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("archive")
_log = log.get("archive")

PREFIX = "nexhb-archive-"
CONTENT = b"nexhb recognizes its archive by the name of this object. Without it, nexhb archives and drops nothing.\n"
ARCHIVES_CHECKED = 5  # a store without a marker must have at least one of this number of known archives
HINT = (
    "Mount it, or correct archive.url; if the archive was moved there, or is to start afresh there: "
    "`nexhb archive adopt`."
)


def location_of(store: Store) -> str:
    """Return the part of the store's URLs that precedes the object names."""
    return store.url(PREFIX).removesuffix(PREFIX)


async def require_marker(conn: Connection, store: Store, spool: Path, now: datetime) -> None:
    """Raise WrongStore unless the store has the marker that the database knows.

    If the database knows no marker yet, put a marker into the store. But if the database has recorded archives in this
    store, raise WrongStore unless the store has at least one of the last ARCHIVES_CHECKED of these archives.
    """
    place = location_of(store)
    row = await conn.fetchrow(_Q["marker"], place)
    if row is not None:
        if not await _is_there(store, row["marker"]):
            raise WrongStore(
                f"{place} lacks the marker {row['marker']}, which was put there on {row['marked_at']:%Y-%m-%d}.",
                hint=HINT,
            )
        return
    archives = await conn.fetch(_Q["archives_at"], place, ARCHIVES_CHECKED)
    if archives and not await _any_is_there(store, [(row["archive_url"], row["checksum_sha256"]) for row in archives]):
        raise WrongStore(f"{place} has none of the last {len(archives)} archives that were stored there.", hint=HINT)
    await put_marker(conn, store, spool, now)


async def is_expected_store(conn: Connection, store: Store) -> bool:
    """Return whether the store has the database's marker; True if the database has no marker. Raises StoreError."""
    row = await conn.fetchrow(_Q["marker"], location_of(store))
    return row is None or await _is_there(store, row["marker"])


async def put_marker(conn: Connection, store: Store, spool: Path, now: datetime) -> None:
    """Put a new marker into the store, which makes the store the expected one."""
    place, name = location_of(store), PREFIX + secrets.token_hex(8)
    async with spooled(spool) as file:
        file.write(CONTENT)
        file.flush()
        await put(store, name, Path(file.name), hashlib.sha256(CONTENT).digest())
    await conn.execute(_Q["set_marker"], place, name, now)
    _log.info("archive.marked", place=place, marker=name)


async def accept_store(
    conn: Connection, store: Store, names: set[str], spool: Path, now: datetime, *, force: bool, dry_run: bool
) -> bool:
    """Make the store the expected store; `names` are the names of its objects. Return False if it already was expected.

    Raises BadInput if the database has recorded archives in this store and the store has none of these, unless `force`.
    """
    place = location_of(store)
    row = await conn.fetchrow(_Q["marker"], place)
    if row is not None and await _is_there(store, row["marker"]):
        return False
    urls = [archive["archive_url"] for archive in await conn.fetch(_Q["archives_at"], place, None)]
    if urls and not force and not any(store.name_of(url) in names for url in urls):
        raise BadInput(
            f"{place} has none of the {len(urls)} archives that the database knows there.",
            hint="Mount it, or correct archive.url; --force starts the archive afresh, and those archives are lost.",
        )
    if not dry_run:
        await put_marker(conn, store, spool, now)
    return True


async def _is_there(store: Store, name: str) -> bool:
    """Return whether the store has an object of that name, whatever its content."""
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
