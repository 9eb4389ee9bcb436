"""The operators' read calls: the fleet, its devices and their history."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from operator import itemgetter
from typing import cast

import msgspec
from aiohttp import web

from nexhb.devices.presence import Presence
from nexhb.heartbeat import BUCKET_START, CONTENT
from nexhb.http.operator_api import archived, device_filters, listing, silenced
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.operator_api.listing import Listing, Page
from nexhb.http.transport import query
from nexhb.http.transport.problem import Problem, json_response
from nexhb.reading import rollout
from nexhb.reading.queries import (
    BY_DEVICE_ID,
    LATEST_HEARD,
    LONGEST_SILENT,
    DeviceQuery,
    KeyPosition,
    OfflineQuery,
    PagePosition,
    Query,
    ReadResult,
    StatusQuery,
    UnityDownQuery,
)
from nexhb.reading.rows import LISTED_DEVICE

MAX_PAGE = 1_000
MAX_LIST = 10_000

_FOUND = (
    "device_id", "name", "alias", "site", "last_ts", "heard_at", "received_at", "clock_wrong", "clock_skew_seconds",
    "network_type", "ssid", "ip", "battery_pct", "unity_running", "agent_version",
)  # fmt: skip
DEVICES = Listing("devices", LISTED_DEVICE, 100, MAX_PAGE)
OFFLINE = Listing(
    "devices", (*_FOUND, "offline_seconds", "since", "cause", "incident_id", "silenced"), MAX_LIST, MAX_LIST
)
UNITY_DOWN = Listing(
    "devices", (*_FOUND, "unity_pkg_version", "online", "state", "since", "incident_id", "silenced"), MAX_LIST, MAX_LIST
)
HISTORY = Listing(
    "heartbeats", ("ts", "received_at", "clock_wrong", *(column.name for column in CONTENT)), 100, MAX_LIST
)


def device_id_of(request: web.Request) -> str:
    """Return the id in the path. Raise a 404 Problem if no device can have it."""
    device_id = request.match_info["device_id"]
    if len(device_id) > 100 or "\0" in device_id:
        raise Problem(404, "The device is unknown.")
    return device_id


def _at(presence: Presence) -> dict[str, datetime | None]:
    """Return the time of the answer (`as_of`), and `taking_heartbeats_since`: since when daemons have accepted
    heartbeats, or null while no daemon does. A device's silence before that time means nothing."""
    return {"as_of": presence.now, "taking_heartbeats_since": presence.in_service_since}


def _offline_after(api: OperatorApi) -> timedelta:
    return timedelta(seconds=api.settings.heartbeat.offline_after_seconds)


async def get_fleet(request: web.Request) -> web.Response:
    """Return counts of the whole fleet."""
    api = request.app[OPERATOR_API]
    retention = timedelta(days=api.settings.partitions.retention_days)
    presence, counts = await api.reads.fleet(api.now(), _offline_after(api), retention)
    return json_response({**_at(presence), **counts})


async def get_devices(request: web.Request) -> web.StreamResponse:
    """Return a page of status rows. `next` is the `after` of the following page, null on the last page."""
    api = request.app[OPERATOR_API]
    sorted_by, now = device_filters.sort(request, BY_DEVICE_ID), api.now()
    among = device_filters.chosen(request, now)

    async def fetch(after: str, limit: int) -> Page:
        wanted = StatusQuery(limit, among, sorted_by, device_filters.after_key(after, sorted_by))
        presence, found, position = await api.reads.devices(wanted, now, _offline_after(api))
        await silenced.mark_devices(api, found, now)
        return Page(found, device_filters.next_key(position, sorted_by), _at(presence))

    return await listing.respond(request, DEVICES, fetch)


async def get_offline(request: web.Request) -> web.StreamResponse:
    """Return the devices that have been silent for longer than `minutes`."""
    minutes = query.number(request, "minutes", 0, 1, 525_600)
    silent_for = timedelta(minutes=minutes) if minutes else _offline_after(request.app[OPERATOR_API])
    return await _list(request, OFFLINE, partial(OfflineQuery, silent_for), LONGEST_SILENT)


async def get_unity_down(request: web.Request) -> web.StreamResponse:
    """Return the devices that sent a heartbeat within 24 h and whose Unity app does not run. `state` tells which of
    them are online."""
    make_query = partial(UnityDownQuery, _offline_after(request.app[OPERATOR_API]))
    return await _list(request, UNITY_DOWN, make_query, LATEST_HEARD)


async def get_device(request: web.Request) -> web.Response:
    """Return one device and its last status."""
    api, device_id = request.app[OPERATOR_API], device_id_of(request)
    fleet_query = DeviceQuery(device_id, _offline_after(api))
    _, presence, result = await _read(request, fleet_query, device_id, api.now())
    await silenced.mark_devices(api, result.rows, presence.now)
    refusal, shared = await api.reads.troubles(device_id)
    # The events of this daemon's last minute are not stored yet.
    recent, recently_shared = api.troubles.last_refusal(device_id), api.troubles.token_shared(device_id)
    latest = max((each for each in (refusal, recent) if each), key=itemgetter("at"), default=None)
    troubles = {"last_refusal": latest, "token_shared": shared or recently_shared}
    return json_response({**_at(presence), **msgspec.structs.asdict(result.rows[0]), **troubles})


async def _list(
    request: web.Request, shape: Listing, make_query: Callable[..., OfflineQuery | UnityDownQuery], default_sort: str
) -> web.StreamResponse:
    """Return a page of a list. A list that is limited by nothing but site, tag and rate limit, and has its own order,
    is read by the list's own statements; the others from device_last_status, whatever the flags are."""
    api = request.app[OPERATOR_API]
    now = api.now()
    among, sorted_by = device_filters.chosen(request, now), device_filters.sort(request, default_sort)
    # The rollout key of a list is the request, since a list has no device. A client that repeats its x-request-id
    # reads from the same source again.
    key = request.headers.get("x-request-id") or str(random.random())  # noqa: S311 - no secret

    async def fetch_own(after: str, limit: int) -> Page:
        fleet_query = make_query(limit, device_filters.after_row(after), among)
        source, presence, result = await _read(request, fleet_query, key, now)
        following = device_filters.next_row(cast("PagePosition | None", result.next_position))
        return await page(source, presence, result, following)

    async def fetch_filtered(after: str, limit: int) -> Page:
        own = make_query(limit)
        silent_for = own.silent_for if isinstance(own, OfflineQuery) else None
        position = device_filters.after_key(after, sorted_by)
        counted = not listing.is_csv(request)
        wanted = StatusQuery(limit, among, sorted_by, position, silent_for, silent_for is None, counted)
        presence, result = await api.reads.listed(wanted, now, _offline_after(api))
        following = device_filters.next_key(cast("KeyPosition | None", result.next_position), sorted_by)
        return await page(api.reads.source, presence, result, following)

    async def page(source: str, presence: Presence, result: ReadResult, following: str | None) -> Page:
        await silenced.mark_devices(api, result.rows, now)
        return Page(result.rows, following, {"count": result.count, **_at(presence), "source": source})

    is_own = among == among.by_number and sorted_by == default_sort
    return await listing.respond(request, shape, fetch_own if is_own else fetch_filtered)


async def _read(request: web.Request, fleet_query: Query, key: str, now: datetime) -> tuple[str, Presence, ReadResult]:
    """Return the result and its source, which the flags choose. perf_diff may repeat the query on both sources."""
    api = request.app[OPERATOR_API]
    flags = api.flags.current
    fast = flags.read_from_last_status and rollout.is_included(key, flags.rollout_percent)
    reads = api.reads if fast else api.history_reads
    presence, result = await reads.run(fleet_query, now)
    api.perf_diff.offer(fleet_query)
    return reads.source, presence, result


async def get_history(request: web.Request) -> web.StreamResponse:
    """Return the heartbeats of one device with from ≤ ts < to, newest first; by default those of the last 24 hours.
    With `archived`, those of archived days, too. `next` is the `after` of the following page, null on the last page."""
    api = request.app[OPERATOR_API]
    device_id, is_archived = device_id_of(request), query.boolean(request, "archived")
    # A device's clock may be ahead by up to accept_future, and its heartbeats must be included.
    end = query.moment(request, "to", api.now() + api.settings.ingest.accept_future)
    start = query.moment(request, "from", end - timedelta(hours=24))

    async def fetch(after: str, limit: int) -> Page:
        bucket = query.integer("after", after, 0, 2**31) if after else None
        rows = await api.reads.history(device_id, start, end, limit + 1, bucket)
        archives = await archived.between(api, start, end)
        if is_archived and archives:
            until = end if bucket is None else min(end, BUCKET_START + timedelta(seconds=bucket))
            wanted = archived.Wanted(device_id, start, until, limit + 1)
            needed = [each for each in archives if each.start < until]
            rows = await archived.add_heartbeats(request, wanted, needed, rows)
        following = str(rows[limit - 1][0]) if len(rows) > limit else None
        about = {"device_id": device_id, "archived_days": archived.days_of(archives)}
        return Page([row for _, row in rows[:limit]], following, about)

    return await listing.respond(request, HISTORY, fetch)
