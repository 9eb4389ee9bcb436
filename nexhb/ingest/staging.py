"""A temporary table for rows whose keys may exist already, shared by the writer and the import."""

from __future__ import annotations

from collections.abc import Iterable

import asyncpg

from nexhb.heartbeat import HISTORY_COLUMNS, Key, key_of
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("staging")


async def stage(conn: Connection, records: Iterable[tuple[object, ...]]) -> None:
    """Copy rows of HISTORY_COLUMNS into the temporary table, which the end of the transaction empties. `conn` must use
    packed values (`db.use_packed`)."""
    await conn.execute(_Q["stage_table"])
    await conn.copy_records_to_table("hb_stage", records=records, columns=HISTORY_COLUMNS)


async def insert_staged(conn: Connection) -> set[Key]:
    """Insert the staged rows whose keys do not exist yet into the history; return the keys of the new rows."""
    return keys_of(await conn.fetch(_Q["insert_staged"]))


async def clear(conn: Connection) -> None:
    """Empty the temporary table within a transaction."""
    await conn.execute(_Q["clear_stage"])


def keys_of(records: Iterable[asyncpg.Record]) -> set[Key]:
    """Return the keys of records that have device_no and bucket."""
    return {key_of(record["device_no"], record["bucket"]) for record in records}
