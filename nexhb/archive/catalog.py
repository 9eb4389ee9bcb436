"""The catalog: which archives the database knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

import asyncpg

from nexhb import partitions
from nexhb.archive.manifest import Manifest
from nexhb.errors import BadInput
from nexhb.partitions import midnight
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Connection

_Q = sql.queries("archive")
_P = sql.queries("partitions")


@dataclass(frozen=True)
class Archived:
    """One archive in the catalog: the archive of a day (supplement_no 0) or a supplement with late heartbeats."""

    partition: str
    start: datetime
    end: datetime
    state: str
    url: str  # URL of the manifest
    sha256: str  # SHA-256 of the manifest, hex
    supplement_no: int = 0


async def find(conn: Connection, day: date) -> list[Archived]:
    """Return the day's archive and its supplements. Raises BadInput if the day has no archive."""
    archives = [_archived(row) for row in await conn.fetch(_Q["find"], midnight(day)) if row["archive_url"]]
    if not archives:
        raise BadInput(f"{day} is not archived.", hint="`nexhb archive list` lists the archived days.")
    return archives


async def find_detached(conn: Connection, day: date) -> Archived | None:
    """Return the day if its table exists, detached and not archived yet; None otherwise."""
    for row in await conn.fetch(_Q["find"], midnight(day)):
        if row["archive_url"] is None and await partitions.table_exists(conn, row["partition_name"]):
            return _archived(row)
    return None


async def list_archives(conn: Connection) -> Sequence[asyncpg.Record]:
    """Return every archive and supplement, and every day whose archiving failed, newest first."""
    rows: Sequence[asyncpg.Record] = await conn.fetch(_Q["list"])
    return rows


async def current_archives(conn: Connection) -> list[Archived]:
    """Return the archives and supplements, oldest first, except those whose rows were restored to the day's table."""
    return [_archived(row) for row in await conn.fetch(_Q["current"])]


async def between(conn: AnyConnection, start: datetime, end: datetime, max_days: int) -> list[Archived]:
    """Return the archives of the days within start ≤ t < end that the database no longer has, and their supplements,
    the newest day first."""
    return [_archived(row) for row in await conn.fetch(_Q["between"], start, end, max_days)]


async def record_archive(conn: Connection, manifest: Manifest, sha256: str, url: str, now: datetime) -> None:
    """Record the verified archive of a day, and delete the records of earlier supplements: a restore merged their rows
    into the day's table, so that this archive contains the rows too."""
    async with conn.transaction():
        name = manifest.partition
        await conn.execute(_Q["supersede_day"], name, url, now)
        await conn.execute(_Q["not_superseded"], url)
        await conn.execute(_P["archived"], name, manifest.rows, manifest.bytes, sha256, url, now)
        await conn.execute(_Q["forget_supplements"], name)


async def record_drill(conn: Connection, archived: Archived, now: datetime) -> None:
    """Record that a trial restore of this archive succeeded."""
    await conn.execute(_Q["drilled"], archived.url, now)
    await conn.execute(_Q["supplement_drilled"], archived.url, now)


async def record_verification(conn: Connection, url: str, now: datetime) -> None:
    """Record that the verification of this archive succeeded."""
    await conn.execute(_Q["verified"], url, now)
    await conn.execute(_Q["supplement_verified"], url, now)


def _archived(row: asyncpg.Record) -> Archived:
    return Archived(
        row["partition_name"], row["range_start"], row["range_end"], row["state"], row["archive_url"],
        row["checksum_sha256"], row["supplement_no"],
    )  # fmt: skip


async def release(conn: Connection, day: date) -> str:
    """Let the next nightly run archive a restored day again, and return the partition's name.

    Raises BadInput if the day was not restored.
    """
    name: str | None = await conn.fetchval(_Q["release"], midnight(day))
    if name is None:
        raise BadInput(f"{day} is not a restored day.")
    return name
