"""Answer the operators' queries from the history with a window function, as the old system did."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

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
    page_of,
    start_of,
)

_Q = sql.history_reads()

MAX_QUEUE_AGE = timedelta(days=8)  # the age that a heartbeat may have on arrival (ingest.accept_past: 7 days)
MAX_CLOCK_AHEAD = timedelta(days=1)  # limit of ingest.accept_future, by which a ts may be later than now
# A read from the history may use only one core. With the default 4 MB of work_mem, its sort takes twice as long.
HISTORY_SESSION: dict[str, Any] = {"max_parallel_workers_per_gather": "0", "jit": "off", "work_mem": "16MB"}


@dataclass(frozen=True)
class HistoryReader:
    """Runs queries on the history. A device that is silent for longer than `retention` is inactive."""

    retention: timedelta
    source = "legacy"

    async def run(self, conn: AnyConnection, query: Query, presence: Presence) -> ReadResult:
        """Return the result at `presence.now`."""
        now = presence.now
        until, inactive_before = now + MAX_CLOCK_AHEAD, now - self.retention
        if isinstance(query, DeviceQuery):
            records = await conn.fetch(_Q["device"], query.device_id, until, inactive_before)
            return ReadResult(len(records), rows.with_online(records, presence, query.online_within, "silenced"))
        numbers = await filters.numbers(conn, query.among)
        if isinstance(query, OfflineQuery):
            silent = presence.silent_for(query.silent_for)
            records = await conn.fetch(
                _Q["list_offline"], silent.before, silent.multirange, until, inactive_before, query.limit + 1,
                *start_of(query), numbers,
            )  # fmt: skip
            listed = rows.with_silence(records, presence)
            await filters.add_sites(conn, records, listed)
            return page_of(query, rows.total(records), listed, rows.numbers(records))
        since = now - UNITY_DOWN_WINDOW
        records = await conn.fetch(
            _Q["list_unity_down"], since, until, since - MAX_QUEUE_AGE, query.limit + 1, *start_of(query), numbers
        )
        listed = rows.with_online(records, presence, query.online_within, *rows.WATCHED)
        await filters.add_sites(conn, records, listed)
        return page_of(query, rows.total(records), listed, rows.numbers(records))
