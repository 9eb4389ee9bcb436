"""Import NexMDM's devices and their tokens. A device that cannot be imported is reported, without ending the import."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from asyncpg import Record

from nexhb import partitions
from nexhb.nexmdm import rows
from nexhb.nexmdm.source import NexmdmDatabase
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("nexmdm_import")

RENAMES_PER_STATEMENT = 200
MAX_NAMED = 1_000  # limit of listed devices that could not be imported; all of them are counted


@dataclass
class ImportedDevices:
    """The result of importing devices."""

    seen: int = 0
    made: int = 0
    tokens_added: int = 0
    hashes_waiting: int = 0  # bcrypt hashes that this run stored; the first heartbeat identifies the token
    renamed: int = 0  # known devices that were renamed in the source since the last import
    tokens_revoked: int = 0  # known tokens that were revoked in the source since the last import
    known: int = 0  # devices that an earlier run imported from this source
    older: int = 0  # known devices whose last_seen was later in an earlier run
    numbers: dict[str, int] = field(default_factory=dict)  # device_id → device_no of the imported devices
    rejected_ids: set[str] = field(default_factory=set)  # device ids that nexhb does not allow
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str]] = field(default_factory=list)  # device_id and reason, for a device or its token
    dropped: Counter[str] = field(default_factory=Counter)  # number of values that became null, by column

    def reject(self, device_id: str, reason: str) -> None:
        """Record that a device, or its token, could not be imported."""
        self.reasons[reason] += 1
        if len(self.rejected) < MAX_NAMED:
            self.rejected.append((device_id, reason))

    def update(self, later: ImportedDevices) -> None:
        """Add the result of a second pass, which imported devices that were enrolled during the first one."""
        self.seen = later.seen
        self.made += later.made
        self.tokens_added += later.tokens_added
        self.hashes_waiting += later.hashes_waiting
        self.renamed += later.renamed
        self.tokens_revoked += later.tokens_revoked
        self.numbers |= later.numbers
        self.rejected_ids |= later.rejected_ids
        self.reasons, self.rejected, self.dropped = later.reasons, later.rejected, later.dropped


async def import_all(source: NexmdmDatabase, conn: Connection, now: datetime) -> ImportedDevices:
    """Import every device of the source, and its token or hash. Idempotent; each page is one transaction."""
    result = ImportedDevices()
    async for page in source.devices():
        await _import_page(conn, page, result, now, source.name)
    return result


async def import_rows(conn: Connection, page: list[Record], now: datetime, source: str) -> ImportedDevices:
    """Import these devices of the source that is named `source`, in one transaction."""
    result = ImportedDevices()
    await _import_page(conn, page, result, now, source)
    return result


async def _import_page(
    conn: Connection, page: list[Record], result: ImportedDevices, now: datetime, source: str
) -> None:
    result.seen += len(page)
    valid = [row for row in page if _is_valid(row, result)]
    async with conn.transaction():
        await _add(conn, valid, result, now)
        await _note(conn, source, valid, result)
        await _give_tokens(conn, valid, result, now)
    for start in range(0, len(valid), RENAMES_PER_STATEMENT):
        # This may deadlock: a heartbeat locks the status, then the device; a rename locks the device, then the status.
        result.renamed += await partitions.retry_while_locked(
            _rename, conn, valid[start : start + RENAMES_PER_STATEMENT]
        )


async def _rename(conn: Connection, chunk: list[Record]) -> int:
    names = [rows.name(row) for row in chunk]
    status: str = await conn.execute(_Q["name_devices"], [row["id"] for row in chunk], names)
    return int(status.rsplit(maxsplit=1)[-1])


def _is_valid(row: Record, result: ImportedDevices) -> bool:
    reason = rows.id_error(row["id"])
    if reason:
        result.rejected_ids.add(row["id"])
        result.reject(row["id"], reason)
    return reason is None


async def _add(conn: Connection, page: list[Record], result: ImportedDevices, now: datetime) -> None:
    dropped: list[str] = []
    values = [(row["id"], *rows.facts(row, dropped), row["created_at"], row["token_revoked_at"]) for row in page]
    result.dropped.update(dropped)
    if values:
        result.made += len(await conn.fetch(_Q["add_devices"], *zip(*values, strict=True), now))
    ids = [row["id"] for row in page]
    result.numbers |= {row["device_id"]: row["device_no"] for row in await conn.fetch(_Q["numbers"], ids)}


async def _note(conn: Connection, source: str, page: list[Record], result: ImportedDevices) -> None:
    numbers = [result.numbers[row["id"]] for row in page]
    last_seen = [row["last_seen"] for row in page]
    counts = await conn.fetchrow(_Q["note_devices"], source, numbers, last_seen)
    assert counts is not None  # noqa: S101 - an aggregate has one row
    result.known += counts["known"]
    result.older += counts["older"]


async def _give_tokens(conn: Connection, page: list[Record], result: ImportedDevices, now: datetime) -> None:
    values, ids = [], {}
    for row in page:
        token = rows.token(row)
        if isinstance(token, str):
            result.reject(row["id"], token)
            continue
        number = result.numbers[row["id"]]
        ids[number] = row["id"]
        values.append((number, token.fingerprint, token.sha256, token.bcrypt, row["token_revoked_at"]))
    if not values:
        return
    counts = await conn.fetchrow(_Q["give_tokens"], *zip(*values, strict=True), now)
    assert counts is not None  # noqa: S101 - a SELECT without FROM has one row
    result.tokens_added += counts["added"]
    result.hashes_waiting += counts["waiting"]
    result.tokens_revoked += counts["revoked"]
    for number in counts["conflicting"]:
        result.reject(ids[number], "the token belongs to another device in nexhb")
