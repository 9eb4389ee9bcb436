"""Answer the operators' queries from device_last_status, with its indexes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import asyncpg

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection
from nexhb.reading import filters, rows
from nexhb.reading.queries import (
    UNITY_DOWN_WINDOW,
    DeviceQuery,
    OfflineQuery,
    Query,
    ReadResult,
    UnityDownQuery,
    page_of,
    start_of,
)

_Q = sql.queries("reads")


class _Statements(NamedTuple):
    """The statements of a list."""

    unsorted: str  # the whole list, if it is not longer than a limit
    page: str
    among: str  # a page of the devices with given numbers


_OFFLINE = _Statements(_Q["offline_all"], _Q["offline"], _Q["offline_among"])
_UNITY_DOWN = _Statements(_Q["unity_down_all"], _Q["unity_down"], _Q["unity_down_among"])


@dataclass(frozen=True)
class LastStatusReader:
    """Runs queries on device_last_status."""

    source = "last_status"

    async def run(self, conn: AnyConnection, query: Query, presence: Presence) -> ReadResult:
        """Return the result at `presence.now`."""
        if isinstance(query, DeviceQuery):
            records = await conn.fetch(_Q["device"], query.device_id)
            return ReadResult(len(records), rows.with_online(records, presence, query.online_within, "silenced"))
        if isinstance(query, OfflineQuery):
            silent = presence.silent_for(query.silent_for)
            condition = (silent.before, silent.multirange)
            count, records = await _first_records(conn, _OFFLINE, condition, query)
            listed = rows.with_silence(records, presence)
        else:
            count, records = await _first_records(conn, _UNITY_DOWN, (presence.now - UNITY_DOWN_WINDOW,), query)
            listed = rows.with_online(records, presence, query.online_within, *rows.WATCHED)
        return page_of(query, count, await filters.add_sites(conn, records, listed), rows.numbers(records))


async def _first_records(
    conn: AnyConnection,
    statements: _Statements,
    condition: tuple[object, ...],
    query: OfflineQuery | UnityDownQuery,
) -> tuple[int, list[asyncpg.Record]]:
    """Return the total count, and the first `limit` + 1 records after the query's position, both as of the same
    moment."""
    max_rows = query.limit + 1
    numbers = await filters.numbers(conn, query.among)
    if numbers is not None:
        records = await conn.fetch(statements.among, *condition, max_rows, *start_of(query), numbers)
        return rows.total(records), records
    if query.after is None:
        records = await conn.fetch(statements.unsorted, *condition, max_rows)
        if len(records) < max_rows:
            records.sort(key=itemgetter("heard_at", "device_id"), reverse=isinstance(query, UnityDownQuery))
            return len(records), records
    records = await conn.fetch(statements.page, *condition, max_rows, *start_of(query))
    return rows.total(records), records
