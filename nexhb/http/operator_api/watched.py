"""The operators' calls for what the watcher recorded: events, incidents, timelines."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from aiohttp import web

from nexhb.http.operator_api import listing, silenced
from nexhb.http.operator_api.context import OPERATOR_API, OperatorApi
from nexhb.http.operator_api.fleet import device_id_of
from nexhb.http.operator_api.listing import Listing, Page
from nexhb.http.transport import query
from nexhb.http.transport.problem import json_response
from nexhb.reading.events import EventFilter

KINDS = (
    "offline", "online", "unity_down", "unity_up", "battery_low", "battery_ok", "clock_wrong", "clock_right",
    "rebooted", "app_changed", "token_shared", "flapping",
)  # fmt: skip
MAX_PAGE = 1_000
EVENTS = Listing(
    "events",
    ("event_id", "at", "since", "device_id", "site", "kind", "cause", "evidence", "incident_id"),
    100,
    MAX_PAGE,
)
INCIDENTS = Listing(
    "incidents",
    (
        "incident_id", "kind", "scope", "site", "severity", "cause", "since", "opened_at", "resolved_at", "settled_at",
        "acked_at", "acked_by", "members", "devices", "continues", "silenced", "named", "evidence",
    ),
    100,
    MAX_PAGE,
)  # fmt: skip
MAX_PLACE = 10**12 - 1
ALL = timedelta(days=3650)


async def get_events(request: web.Request) -> web.StreamResponse:
    """Return a page of events, newest first; with order=asc oldest first, for clients that follow the events. `next` is
    the `after` of the following page; with order=asc it is never null, because more events will come."""
    api = request.app[OPERATOR_API]
    ascending = query.choice(request, "order", ("desc", "asc")) == "asc"
    chosen = event_filter(request, api)

    async def fetch(after: str, limit: int) -> Page:
        place = _place(after)
        rows = await api.events.events(chosen, limit + 1, place, ascending=ascending)
        following = rows[limit - 1]["event_id"] if len(rows) > limit else None
        if ascending and following is None:
            following = rows[-1]["event_id"] if rows else place or 0
        return Page(rows[:limit], None if following is None else str(following))

    return await listing.respond(request, EVENTS, fetch)


def _place(after: str) -> int | None:
    return query.integer("after", after, 0, MAX_PLACE) if after else None


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


async def get_incidents(request: web.Request) -> web.StreamResponse:
    """Return a page of incidents, newest first: the open ones, or with state=all also those that are resolved."""
    api = request.app[OPERATOR_API]
    is_open = query.choice(request, "state", ("open", "all")) == "open"
    site = query.text(request, "site")

    async def fetch(after: str, limit: int) -> Page:
        rows = await api.events.incidents(
            open_only=is_open, limit=limit + 1, after=_place(after), sites=[site] if site else None
        )
        await silenced.mark_incidents(api, rows[:limit], api.now())
        return Page(rows[:limit], str(rows[limit - 1]["incident_id"]) if len(rows) > limit else None)

    return await listing.respond(request, INCIDENTS, fetch)


async def get_timeline(request: web.Request) -> web.Response:
    """Return when a device was online and offline, and why; by default in the last seven days."""
    api = request.app[OPERATOR_API]
    device_id = device_id_of(request)
    end = query.moment(request, "to", api.now())
    start = query.moment(request, "from", end - timedelta(days=7))
    found, more = await api.events.timeline(device_id, start, end)
    return json_response({"device_id": device_id, "intervals": [asdict(each) for each in found], "truncated": more})
