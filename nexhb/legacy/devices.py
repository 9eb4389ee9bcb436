"""NexMDM's devices, and what it knows of their tokens. What cannot be taken is named, and stops nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from asyncpg import Record

from nexhb import partitions, sql
from nexhb.db import Connection
from nexhb.legacy import rows
from nexhb.legacy.source import Source

_Q = sql.queries("legacy")

RENAMED_AT_ONCE = 200
NAMED_MOST = 1_000  # of what could not be taken; all of it is counted


@dataclass
class Devices:
    """What became of them."""

    seen: int = 0
    made: int = 0
    tokens_added: int = 0
    hashes_waiting: int = 0  # taken by this run: adopted with the device's first heartbeat
    renamed: int = 0  # known here, and called otherwise there since the last import
    tokens_revoked: int = 0  # known here, and revoked there meanwhile
    known: int = 0  # an earlier import took them from this source
    older: int = 0  # of these: it found that they had been seen later
    numbers: dict[str, int] = field(default_factory=dict)  # device_id → device_no, of those taken
    not_taken: set[str] = field(default_factory=set)  # device ids that are none here
    reasons: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)  # device_id and why; its token, or all of it
    dropped: Counter[str] = field(default_factory=Counter)  # values that became null, by column

    def refuse(self, device_id: str, reason: str) -> None:
        """Something of it could not be taken."""
        self.reasons[reason] += 1
        if len(self.refused) < NAMED_MOST:
            self.refused.append((device_id, reason))

    def grow(self, later: Devices) -> None:
        """With what a second look found: devices that were enrolled meanwhile."""
        self.seen = later.seen
        self.made += later.made
        self.tokens_added += later.tokens_added
        self.hashes_waiting += later.hashes_waiting
        self.renamed += later.renamed
        self.tokens_revoked += later.tokens_revoked
        self.numbers |= later.numbers
        self.not_taken |= later.not_taken
        self.reasons, self.refused, self.dropped = later.reasons, later.refused, later.dropped


async def take(source: Source, conn: Connection, now: datetime) -> Devices:
    """Take every device of the source, and what it knows of the tokens. Idempotent; a page is one transaction."""
    found = Devices()
    async for page in source.devices():
        await _take_page(conn, page, found, now, source.name)
    return found


async def take_rows(conn: Connection, page: list[Record], now: datetime, source: str) -> Devices:
    """Likewise these devices of the source of that name, in one transaction."""
    found = Devices()
    await _take_page(conn, page, found, now, source)
    return found


async def _take_page(conn: Connection, page: list[Record], found: Devices, now: datetime, source: str) -> None:
    found.seen += len(page)
    good = [row for row in page if _is_good(row, found)]
    async with conn.transaction():
        await _add(conn, good, found, now)
        await _note(conn, source, good, found)
        await _give_tokens(conn, good, found, now)
    for start in range(0, len(good), RENAMED_AT_ONCE):
        # A heartbeat locks the status before its device, a new name the device before its status.
        found.renamed += await partitions.patiently(_rename, conn, good[start : start + RENAMED_AT_ONCE])


async def _rename(conn: Connection, chunk: list[Record]) -> int:
    names = [rows.name(row) for row in chunk]
    done: str = await conn.execute(_Q["name_devices"], [row["id"] for row in chunk], names)
    return int(done.rsplit(maxsplit=1)[-1])


def _is_good(row: Record, found: Devices) -> bool:
    reason = rows.why_no_device(row["id"])
    if reason:
        found.not_taken.add(row["id"])
        found.refuse(row["id"], reason)
    return reason is None


async def _add(conn: Connection, page: list[Record], found: Devices, now: datetime) -> None:
    dropped: list[str] = []
    values = [(row["id"], *rows.facts(row, dropped), row["created_at"], row["token_revoked_at"]) for row in page]
    found.dropped.update(dropped)
    if values:
        found.made += len(await conn.fetch(_Q["add_devices"], *zip(*values, strict=True), now))
    ids = [row["id"] for row in page]
    found.numbers |= {row["device_id"]: row["device_no"] for row in await conn.fetch(_Q["numbers"], ids)}


async def _note(conn: Connection, source: str, page: list[Record], found: Devices) -> None:
    numbers = [found.numbers[row["id"]] for row in page]
    seen = [row["last_seen"] for row in page]
    noted = await conn.fetchrow(_Q["note_devices"], source, numbers, seen)
    assert noted is not None  # noqa: S101 - an aggregate has one row
    found.known += noted["known"]
    found.older += noted["older"]


async def _give_tokens(conn: Connection, page: list[Record], found: Devices, now: datetime) -> None:
    values, ids = [], {}
    for row in page:
        token = rows.token(row)
        if isinstance(token, str):
            found.refuse(row["id"], token)
            continue
        number = found.numbers[row["id"]]
        ids[number] = row["id"]
        values.append((number, token.fingerprint, token.sha256, token.bcrypt, row["token_revoked_at"]))
    if not values:
        return
    given = await conn.fetchrow(_Q["give_tokens"], *zip(*values, strict=True), now)
    assert given is not None  # noqa: S101 - a SELECT without FROM has one row
    found.tokens_added += given["added"]
    found.hashes_waiting += given["waiting"]
    found.tokens_revoked += given["revoked"]
    for number in given["taken"]:
        found.refuse(ids[number], "its token is another device's here")
