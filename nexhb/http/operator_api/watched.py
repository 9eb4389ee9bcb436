"""The operators' calls for what the watcher recorded: events, incidents, timelines."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from aiohttp import web

from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.operator_api.fleet import device_id_of
from nexhb.http.transport import query
from nexhb.http.transport.problem import json_response
from nexhb.reading.events import EventFilter

KINDS = (
    "offline", "online", "unity_down", "unity_up", "battery_low", "battery_ok", "clock_wrong", "clock_right",
    "rebooted", "app_changed", "token_shared", "flapping",
)  # fmt: skip
MAX_PAGE = 1_000
MAX_PLACE = 10**12 - 1
ALL = timedelta(days=3650)


async def get_events(request: web.Request) -> web.Response:
    """Return a page of events, newest first; with order=asc oldest first, for clients that follow the events. `next` is
    the `after` of the following page; with order=asc it is never null, because more events will come."""
    api = request.app[OPERATOR_API]
    limit = query.number(request, "limit", 100, 1, MAX_PAGE)
    after = query.number(request, "after", -1, 0, MAX_PLACE)
    ascending = query.choice(request, "order", ("desc", "asc")) == "asc"
    chosen = event_filter(request, api)
    rows = await api.events.events(chosen, limit + 1, None if after < 0 else after, ascending=ascending)
    following = rows[limit - 1]["event_id"] if len(rows) > limit else None
    if ascending and following is None:
        following = rows[-1]["event_id"] if rows else max(after, 0)
    return json_response({"events": rows[:limit], "next": None if following is None else str(following)})


def event_filter(request: web.Request, api: OperatorApi) -> EventFilter:
    """Parse `from`, `to`, `site`, `kind` and `device`. Raise a 400 Problem."""
    end = query.moment(request, "to", api.now() + timedelta(days=1))
    site, kind, device = (query.text(request, name) for name in ("site", "kind", "device"))
    if kind:
        query.choice(request, "kind", KINDS)
    return EventFilter(
        query.moment(request, "from", end - ALL),
        end,
        [site] if site else None,
        [kind] if kind else None,
        device or None,
    )


async def get_incidents(request: web.Request) -> web.Response:
    """Return a page of incidents, newest first: the open ones, or with state=all also those that are resolved."""
    api = request.app[OPERATOR_API]
    limit = query.number(request, "limit", 100, 1, MAX_PAGE)
    after = query.number(request, "after", -1, 0, MAX_PLACE)
    is_open = query.choice(request, "state", ("open", "all")) == "open"
    site = query.text(request, "site")
    rows = await api.events.incidents(
        open_only=is_open, limit=limit + 1, after=None if after < 0 else after, sites=[site] if site else None
    )
    following = str(rows[limit - 1]["incident_id"]) if len(rows) > limit else None
    return json_response({"incidents": rows[:limit], "next": following})


async def get_timeline(request: web.Request) -> web.Response:
    """Return when a device was online and offline, and why; by default in the last seven days."""
    api = request.app[OPERATOR_API]
    device_id = device_id_of(request)
    end = query.moment(request, "to", api.now())
    start = query.moment(request, "from", end - timedelta(days=7))
    found, more = await api.events.timeline(device_id, start, end)
    return json_response({"device_id": device_id, "intervals": [asdict(each) for each in found], "truncated": more})
