"""The operators' read calls: the fleet, its devices and their history."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from operator import itemgetter

import msgspec
from aiohttp import web

from nexhb.devices import registry
from nexhb.devices.presence import Presence
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.transport import query
from nexhb.http.transport.problem import Problem, json_response
from nexhb.reading import rollout
from nexhb.reading.queries import (
    DeviceFilter,
    DeviceQuery,
    OfflineQuery,
    PagePosition,
    Query,
    ReadResult,
    UnityDownQuery,
)

MAX_PAGE = 1_000
MAX_LIST = 10_000
_PLACE = re.compile(r"((?:19[7-9]|2[01]\d)\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)/(.+)", re.ASCII | re.DOTALL)


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


async def get_devices(request: web.Request) -> web.Response:
    """Return a page of status rows. `next` is the `after` of the following page, null on the last page."""
    api = request.app[OPERATOR_API]
    limit = query.number(request, "limit", 100, 1, MAX_PAGE)
    after = query.text(request, "after")
    presence, rows = await api.reads.devices(after, limit + 1, api.now(), _offline_after(api), _among(request))
    has_more = len(rows) > limit
    rows = rows[:limit]
    return json_response({**_at(presence), "devices": rows, "next": rows[-1].device_id if has_more else None})


async def get_offline(request: web.Request) -> web.Response:
    """Return the devices that have been silent for longer than `minutes`."""
    minutes = query.number(request, "minutes", 0, 1, 525_600)
    silent_for = timedelta(minutes=minutes) if minutes else _offline_after(request.app[OPERATOR_API])
    limit = query.number(request, "limit", MAX_LIST, 1, MAX_LIST)
    return await _list(request, OfflineQuery(silent_for, limit, _after(request), _among(request)))


async def get_unity_down(request: web.Request) -> web.Response:
    """Return the devices that sent a heartbeat within 24 h and whose Unity app does not run. `online` tells which of
    them are online."""
    limit = query.number(request, "limit", MAX_LIST, 1, MAX_LIST)
    online_within = _offline_after(request.app[OPERATOR_API])
    return await _list(request, UnityDownQuery(online_within, limit, _after(request), _among(request)))


async def get_device(request: web.Request) -> web.Response:
    """Return one device and its last status."""
    api, device_id = request.app[OPERATOR_API], device_id_of(request)
    fleet_query = DeviceQuery(device_id, _offline_after(api))
    _, presence, result = await _read(request, fleet_query, device_id, api.now())
    refusal, shared = await api.reads.troubles(device_id)
    # The events of this daemon's last minute are not stored yet.
    recent, recently_shared = api.troubles.last_refusal(device_id), api.troubles.token_shared(device_id)
    latest = max((each for each in (refusal, recent) if each), key=itemgetter("at"), default=None)
    troubles = {"last_refusal": latest, "token_shared": shared or recently_shared}
    return json_response({**_at(presence), **msgspec.structs.asdict(result.rows[0]), **troubles})


def _among(request: web.Request) -> DeviceFilter:
    """Parse `site` and `tag`, which limit a list. A site that does not exist has no devices."""
    site, tag = query.text(request, "site"), query.text(request, "tag", registry.MAX_TAG_CHARS)
    return DeviceFilter((site,) if site else None, tag or None)


def _after(request: web.Request) -> PagePosition | None:
    """Parse `after`, the `next` of the previous page: heard_at and id of the last device on that page."""
    text = query.text(request, "after", max_length=150)
    if not text:
        return None
    match = _PLACE.fullmatch(text)
    with suppress(ValueError):
        if match:
            return PagePosition(datetime.fromisoformat(match[1]), match[2])
    raise query.invalid("after", "must be the `next` of the previous page")


def _next(result: ReadResult) -> str | None:
    last = result.next_position
    return last and f"{last.heard_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}/{last.device_id}"


async def _list(request: web.Request, fleet_query: OfflineQuery | UnityDownQuery) -> web.Response:
    now = request.app[OPERATOR_API].now()
    # The rollout key of a list is the request, since a list has no device. A client that repeats its x-request-id reads
    # from the same source again.
    key = request.headers.get("x-request-id") or str(random.random())  # noqa: S311 - no secret
    source, presence, result = await _read(request, fleet_query, key, now)
    return json_response(
        {"count": result.count, **_at(presence), "source": source, "devices": result.rows, "next": _next(result)}
    )


async def _read(request: web.Request, fleet_query: Query, key: str, now: datetime) -> tuple[str, Presence, ReadResult]:
    """Return the result and its source, which the flags choose. perf_diff may repeat the query on both sources."""
    api = request.app[OPERATOR_API]
    flags = api.flags.current
    fast = flags.read_from_last_status and rollout.is_included(key, flags.rollout_percent)
    reads = api.reads if fast else api.history_reads
    presence, result = await reads.run(fleet_query, now)
    api.perf_diff.offer(fleet_query)
    return reads.source, presence, result


async def get_history(request: web.Request) -> web.Response:
    """Return the heartbeats of one device with from ≤ ts < to, newest first; by default those of the last 24 hours.
    `next` is the `after` of the following page, null on the last page."""
    api = request.app[OPERATOR_API]
    device_id = device_id_of(request)
    # A device's clock may be ahead by up to accept_future, and its heartbeats must be included.
    end = query.moment(request, "to", api.now() + api.settings.ingest.accept_future)
    start = query.moment(request, "from", end - timedelta(hours=24))
    limit = query.number(request, "limit", 100, 1, MAX_LIST)
    after = query.number(request, "after", -1, 0, 2**31)
    rows, following = await api.reads.history(device_id, start, end, limit, None if after < 0 else after)
    return json_response(
        {"device_id": device_id, "heartbeats": rows, "next": None if following is None else str(following)}
    )
