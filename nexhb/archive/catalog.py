"""What the database knows of its archives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

import asyncpg

from nexhb import partitions, sql
from nexhb.archive.manifest import Manifest
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.partitions import midnight

_Q = sql.queries("archive")
_P = sql.queries("partitions")


@dataclass(frozen=True)
class Archived:
    """One archive as the database knows it: a day's own (supplement_no 0) or one of what came late."""

    partition: str
    start: datetime
    end: datetime
    state: str
    url: str  # of the manifest
    sha256: str  # of the same, hex
    supplement_no: int = 0


async def find(conn: Connection, day: date) -> list[Archived]:
    """The day's archive and its supplements. Raises BadInput where there is none."""
    found = [_archived(row) for row in await conn.fetch(_Q["find"], midnight(day)) if row["archive_url"]]
    if not found:
        raise BadInput(f"{day} is not archived.", hint="`nexhb archive list` shows what is.")
    return found


async def find_detached(conn: Connection, day: date) -> Archived | None:
    """The day, where its table is there, detached and not archived (yet); else None."""
    for row in await conn.fetch(_Q["find"], midnight(day)):
        if row["archive_url"] is None and await partitions.present(conn, row["partition_name"]):
            return _archived(row)
    return None


async def everything(conn: Connection) -> Sequence[asyncpg.Record]:
    """Every archive and supplement, and every day whose archiving failed, newest first."""
    rows: Sequence[asyncpg.Record] = await conn.fetch(_Q["list"])
    return rows


async def every(conn: Connection) -> list[Archived]:
    """Every archive and supplement that counts, oldest first: not those of a day whose table is there (again)."""
    return [_archived(row) for row in await conn.fetch(_Q["every"])]


async def record(conn: Connection, manifest: Manifest, sha256: str, url: str, now: datetime) -> None:
    """Write down the archive of a day, read back and found whole. It has the rows of the supplements before it, too: a
    restore brought them into the day's table."""
    async with conn.transaction():
        name = manifest.partition
        await conn.execute(_Q["supersede_day"], name, url, now)
        await conn.execute(_Q["not_superseded"], url)
        await conn.execute(_P["archived"], name, manifest.rows, manifest.bytes, sha256, url, now)
        await conn.execute(_Q["forget_supplements"], name)


async def drilled(conn: Connection, archived: Archived, now: datetime) -> None:
    """Write down a drill that went well."""
    await conn.execute(_Q["drilled"], archived.url, now)
    await conn.execute(_Q["supplement_drilled"], archived.url, now)


async def verified(conn: Connection, url: str, now: datetime) -> None:
    """Write down that an archive was read back and found whole."""
    await conn.execute(_Q["verified"], url, now)
    await conn.execute(_Q["supplement_verified"], url, now)


def _archived(row: asyncpg.Record) -> Archived:
    return Archived(
        row["partition_name"], row["range_start"], row["range_end"], row["state"], row["archive_url"],
        row["checksum_sha256"], row["supplement_no"],
    )  # fmt: skip


async def release(conn: Connection, day: date) -> str:
    """Let a restored day be archived again by the next nightly run; its name. Raises BadInput where it is none."""
    name: str | None = await conn.fetchval(_Q["release"], midnight(day))
    if name is None:
        raise BadInput(f"{day} is not a restored day.")
    return name
