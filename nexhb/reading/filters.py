"""Which devices a list is limited to, and what other tables than device_last_status know of its rows: their sites, and
what the watcher has recorded. These tables are read by the numbers of the devices, not joined with
device_last_status."""

from __future__ import annotations

from typing import Any

import asyncpg

from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection
from nexhb.reading.queries import EVERY_DEVICE, DeviceFilter, ReadResult

_Q = sql.queries("reads")


async def numbers(conn: AnyConnection, among: DeviceFilter) -> list[int] | None:
    """Return the numbers of the devices that a list is limited to; None if it is not limited."""
    if among == EVERY_DEVICE:
        return None
    found: list[int] = await conn.fetchval(_Q["numbers"], among.sites, among.tag, among.limited_since)
    return found


async def add_sites(conn: AnyConnection, records: list[asyncpg.Record], rows: list[Any]) -> list[Any]:
    """Set the attribute `site` of the rows that were made from these records, in their order, and return the rows."""
    if rows:
        found = await conn.fetch(_Q["sites_of"], [record["device_no"] for record in records[: len(rows)]])
        sites = {record["device_no"]: record["site"] for record in found}
        if sites:
            for record, row in zip(records, rows, strict=False):
                row.site = sites.get(record["device_no"])
    return rows


async def add_watched(conn: AnyConnection, result: ReadResult, *, is_offline: bool) -> None:
    """Set `since`, `incident_id` and, of silent devices, `cause`. They stay None in the rows of devices about which the
    watcher has recorded nothing yet, or whose state it has adopted."""
    if not result.rows:
        return
    statement = _Q["ongoing_outages"] if is_offline else _Q["ongoing_unity_down"]
    recorded = {record["device_no"]: record for record in await conn.fetch(statement, result.numbers)}
    for number, row in zip(result.numbers, result.rows, strict=True):
        if record := recorded.get(number):
            row.since, row.incident_id = record["since"], record["incident_id"]
            if is_offline:
                row.cause = record["cause"]
