"""Add the devices and tokens of a file: all of them or none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from nexhb.devices import table_file
from nexhb.devices.registry import TAG_SEPARATORS, check_device_id, check_tags, check_text
from nexhb.devices.tokens import hash_token
from nexhb.errors import BadInput
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, lasting
from nexhb.texts import shown

_Q = sql.queries("devices")

MAX_BAD_LINES_NAMED = 20


@dataclass(frozen=True)
class CsvImport:
    """The result of importing a file."""

    rows: int
    devices_made: int
    tokens_added: int
    rows_of_revoked: int = 0  # rows of revoked devices, which still receive 410
    found: str = field(default="", compare=False)  # how the file was interpreted; empty if it has the documented form


async def import_csv(conn: Connection, path: Path) -> CsvImport:
    """Add the devices and tokens of a file (see table_file): all of them or none. Idempotent.

    Raise BadInput that names the bad lines.
    """
    file = table_file.parse(await asyncio.to_thread(path.read_bytes))
    records: list[tuple[object, ...]] = []
    bad_lines = [(line, reason, "") for line, reason in file.bad_lines]
    for row in file.rows:
        try:
            token_hash, texts = _token_hash(row), (text or None for text in (row.alias, row.name))
            records.append((row.line, row.device_id, *texts, token_hash, row.site or None, _tags(row)))
        except BadInput as error:
            bad_lines.append((row.line, error.detail.rstrip("."), ""))
    if bad_lines:
        raise _bad_lines_error(sorted(bad_lines))
    async with lasting(conn):
        await conn.execute(_Q["import_table"])
        await conn.copy_records_to_table("device_import", records=records)
        if conflicts := await conn.fetch(_Q["import_conflicts"]):
            raise _bad_lines_error([(r["line"], r["reason"], r["device_id"]) for r in conflicts])
        devices = await conn.fetch(_Q["import_devices"])
        added = await conn.execute(_Q["import_tokens"])
    made, revoked = sum(row["made"] for row in devices), sum(row["revoked"] for row in devices)
    return CsvImport(len(records), made, int(added.split()[-1]), revoked, "" if file.is_plain else file.description())


def _token_hash(row: table_file.Row) -> bytes:
    """Check a row and return the SHA-256 of its token. Raise BadInput."""
    check_device_id(row.device_id)
    for text, column, max_chars in ((row.alias, "alias", 200), (row.name, "name", 200), (row.site, "site", 100)):
        if text:
            check_text(text, column, max_chars)
    if row.token:
        if len(row.token) < 32:
            raise BadInput("a token must have at least 32 characters.")
        return hash_token(row.token)
    try:
        digest = bytes.fromhex(row.token_sha256)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise BadInput("needs a token, or its SHA-256 as 64 hexadecimal digits.")
    return digest


def _tags(row: table_file.Row) -> list[str]:
    """Return the tags of a row. Raise BadInput."""
    try:
        return check_tags([tag for tag in TAG_SEPARATORS.split(row.tags) if tag])
    except BadInput as error:
        raise BadInput(f"column {error.detail}") from None


def _bad_lines_error(bad_lines: list[tuple[int, str, str]]) -> BadInput:
    """Return an error that names the first bad lines. Each is a line number, a reason, and a device_id or ''."""
    named = [
        f"line {line}{f' ({shown(device_id)})' if device_id else ''}: {reason}"
        for line, reason, device_id in bad_lines[:MAX_BAD_LINES_NAMED]
    ]
    unnamed = len(bad_lines) - len(named)
    more = f"; and {unnamed:,} more lines" if unnamed else ""
    return BadInput(f"{'; '.join(named)}{more}.", hint="Nothing was imported.")
