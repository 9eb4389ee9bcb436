"""Reads for operators, on connection pools of their own, so that a heavy read never holds up ingest.

A read has two sources: device_last_status (`last_status`) or the history (`history`).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from nexhb import availability, metrics
from nexhb.devices import sites
from nexhb.devices.presence import Presence
from nexhb.devices.sites import KnownSite
from nexhb.errors import DatabaseUnavailable, UnknownDevice, described
from nexhb.heartbeat import BUCKET_START
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Pool
from nexhb.postgres.errors import is_unavailable
from nexhb.reading import filtered, filters, rows
from nexhb.reading.history import HistoryReader
from nexhb.reading.last_status import LastStatusReader
from nexhb.reading.queries import (
    EVERY_DEVICE,
    UNITY_DOWN_WINDOW,
    DeviceQuery,
    KeyPosition,
    OfflineQuery,
    Query,
    ReadResult,
    StatusQuery,
)
from nexhb.texts import quoted

_Q = sql.queries("reads")

ACQUIRE_TIMEOUT_S = 5.0
_LAST_BUCKET = 2**31
CAUSES = ("ours", "site", "battery", "power", "network", "app", "unknown")  # why a device is silent

Row = dict[str, Any]


class PooledReader:
    """Runs queries on one source, over a bounded pool. `interval` is the time between two heartbeats of a device."""

    def __init__(self, pool: Pool, reader: LastStatusReader | HistoryReader, interval: timedelta) -> None:
        self._pool = pool
        self._reader = reader
        self._interval = interval

    @property
    def source(self) -> str:
        """The source of the results: last_status or legacy."""
        return self._reader.source

    async def run(self, query: Query, now: datetime) -> tuple[Presence, ReadResult]:
        """Return the `Presence` from which silences were computed, and the result. Raise UnknownDevice if the query is
        for one device and there is no such device, and DatabaseUnavailable if the database is away or no connection of
        the pool becomes free in time."""
        async with _acquired(self._pool, self._observe(query.name)) as conn:
            presence = await availability.read(conn, now, self._interval)
            result = await self._reader.run(conn, query, presence)
            if not isinstance(query, DeviceQuery) and isinstance(self._reader, LastStatusReader):
                # after the result that perf_diff compares
                await filters.add_watched(conn, result, is_offline=isinstance(query, OfflineQuery))
        if isinstance(query, DeviceQuery) and not result.rows:
            raise UnknownDevice(f"{quoted(query.device_id)}.")
        return presence, result

    def _observe(self, query: str) -> Callable[[float], None]:
        if isinstance(self._reader, HistoryReader):
            return metrics.history_read_latency.labels(query=query).observe
        return _last_status_latency(query)


class Reads(PooledReader):
    """All reads of device_last_status, and the read of one device's history."""

    def __init__(self, pool: Pool, interval: timedelta) -> None:
        super().__init__(pool, LastStatusReader(), interval)

    async def fleet(self, now: datetime, offline_after: timedelta, retention: timedelta) -> tuple[Presence, Row]:
        """Return the numbers of devices by name: devices, online, offline, unknown (silent, but perhaps only because of
        a blackout), unity_down, unity_down_online, inactive (silent for longer than the `retention`), never_seen; and
        offline_by_cause, the numbers of silent devices by the causes that the watcher has recorded."""
        async with self.acquired("fleet") as conn:
            presence = await availability.read(conn, now, self._interval)
            silent = presence.silent_for(offline_after)
            row = await conn.fetchrow(
                _Q["fleet"], silent.before, silent.multirange, now - UNITY_DOWN_WINDOW, now - offline_after
            )
            by_cause = {
                each["cause"]: each["devices"] for each in await conn.fetch(_Q["offline_by_cause"], now - retention)
            }
        return presence, {**(row or {}), "offline_by_cause": {cause: by_cause.get(cause, 0) for cause in CAUSES}}

    async def devices(
        self, query: StatusQuery, now: datetime, offline_after: timedelta
    ) -> tuple[Presence, list[Any], KeyPosition | None]:
        """Return a page of status rows, and the position of its last row if more rows follow. Devices that have no
        last status are listed only if the query does not depend on it."""
        async with self.acquired("devices") as conn:
            presence = await availability.read(conn, now, self._interval)
            if not query.needs_status:
                devices = await _devices(conn, query)
                statuses = await conn.fetch(_Q["statuses"], [device["device_no"] for device in devices])
                found = rows.devices_with_status(devices, statuses, presence, offline_after)
                return presence, *_page(found, [0] * len(found), query.limit)
            async with filtered.snapshot(conn):
                page = await filtered.page(conn, query._replace(limit=query.limit + 1), presence, offline_after)
                devices = await filtered.rows(conn, _Q["devices_of"], page.numbers)
                statuses = await conn.fetch(_Q["statuses"], page.numbers)
        found = rows.devices_with_status(devices, statuses, presence, offline_after)
        return presence, *_page(found, page.keys, query.limit)

    async def listed(self, query: StatusQuery, now: datetime, offline_after: timedelta) -> tuple[Presence, ReadResult]:
        """Return a page of the silent devices, or of those whose Unity is down (`query.unity_down`)."""
        async with self.acquired("filtered") as conn:
            presence = await availability.read(conn, now, self._interval)
            async with filtered.snapshot(conn):
                page = await filtered.page(conn, query._replace(limit=query.limit + 1), presence, offline_after)
                statement = _Q["unity_down_rows"] if query.unity_down else _Q["offline_rows"]
                records = await filtered.rows(conn, statement, page.numbers[: query.limit])
                if query.unity_down:
                    found = rows.with_online(records, presence, offline_after, *rows.WATCHED)
                else:
                    found = rows.with_silence(records, presence)
                await filters.add_sites(conn, records, found)
                _, position = _page(found, page.keys, query.limit)
                result = ReadResult(page.total or 0, found, position, rows.numbers(records))
                await filters.add_watched(conn, result, is_offline=not query.unity_down)
        return presence, result

    async def sites(self, after: str, limit: int, within: Sequence[str] | None = None) -> list[KnownSite]:
        """Return a page of sites in the order of their ids, starting after the id `after`; only those `within`, unless
        that is None."""
        async with self.acquired("sites") as conn:
            return await sites.page(conn, after, limit, within=within)

    async def site(self, site: str, within: Sequence[str] | None = None) -> KnownSite:
        """Return a site. Raise UnknownSite."""
        async with self.acquired("site") as conn:
            return await sites.get(conn, site, within=within)

    async def troubles(self, device_id: str) -> tuple[Row | None, Row | None]:
        """Return the device's last refusal, and since when two kiosks share its token. Each is None if there is nothing
        to report, or if the device is unknown."""
        async with self.acquired("troubles") as conn:
            row = await conn.fetchrow(_Q["troubles"], device_id)
        if row is None:
            return None, None
        refusal = {"at": row["refused_at"], **{name: row[name] for name in ("status", "reason", "field")}}
        shared = {"since": row["since"], "last_at": row["last_at"], "kiosks": json.loads(row["evidence"] or "[]")}
        return refusal if row["refused_at"] else None, shared if row["since"] else None

    async def history(
        self, device_id: str, start: datetime, end: datetime, limit: int, after: int | None = None
    ) -> list[tuple[int, Row]]:
        """Return the first `limit` of the device's heartbeats with start ≤ ts < end, newest first, from buckets before
        `after`, each with its bucket. Raise UnknownDevice if there is no such device."""
        if after is not None:  # a bucket is at most an hour long, so later partitions need not be read
            end = min(end, BUCKET_START + timedelta(seconds=after + 3600))
        async with self.acquired("history") as conn:
            device_no = await conn.fetchval(_Q["device_no"], device_id)
            if device_no is None:
                raise UnknownDevice(f"{quoted(device_id)}.")
            below = _LAST_BUCKET if after is None else after
            records = await conn.fetch(_Q["history"], device_no, start, end, limit, below)
        heartbeats = [dict(record) for record in records]
        return [(heartbeat.pop("bucket"), heartbeat) for heartbeat in heartbeats]

    @asynccontextmanager
    async def acquired(self, query: str) -> AsyncIterator[PoolConnectionProxy]:
        """Provide a connection for a read, whose latency is recorded under this name."""
        async with _acquired(self._pool, _last_status_latency(query)) as conn:
            yield conn


async def _devices(conn: AnyConnection, query: StatusQuery) -> list[asyncpg.Record]:
    """Return the first `limit` + 1 devices of a query that does not depend on the last status."""
    after, among, limit = query.after.device_id, query.among, query.limit + 1
    if among == EVERY_DEVICE:
        return await conn.fetch(_Q["device_page"], after, limit)
    is_revoked = {"revoked": True, "never_seen": False}.get(among.state)
    arguments = (*among.by_number[:3], among.text, is_revoked)
    if among.state == "never_seen":
        return await filtered.never_seen(conn, arguments, after, limit)
    return await conn.fetch(_Q["device_page_among"], after, limit, *arguments)


def _page(found: list[Any], keys: list[int], limit: int) -> tuple[list[Any], KeyPosition | None]:
    has_more = len(keys) > limit
    return found[:limit], KeyPosition(keys[limit - 1], found[limit - 1].device_id) if has_more else None


def _last_status_latency(query: str) -> Callable[[float], None]:
    series = metrics.last_status_read_latency_ms.labels(query=query)
    return lambda seconds: series.observe(seconds * 1000)


@asynccontextmanager
async def _acquired(pool: Pool, observe: Callable[[float], None]) -> AsyncIterator[PoolConnectionProxy]:
    """Provide a connection of the pool. Pass the duration of the block in seconds to `observe`. Raise
    DatabaseUnavailable if the database cannot be reached."""
    started = time.perf_counter()
    try:
        async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
            yield conn
    except Exception as error:
        if is_unavailable(error):
            raise DatabaseUnavailable(described(error)) from error
        raise
    observe(time.perf_counter() - started)
