"""GET /v1/uptime: for how long devices, sites or the fleet were up."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta
from typing import Any

from aiohttp import web

from nexhb.devices import registry
from nexhb.errors import UnknownSite
from nexhb.http.operator_api.context import OPERATOR_API
from nexhb.http.transport import query
from nexhb.http.transport.csv_response import stream_csv
from nexhb.http.transport.problem import Problem, json_response
from nexhb.partitions import midnight
from nexhb.watching.uptime_reads import MAX_PAGE, PARTS, UptimePage, UptimeQuery

DAY = timedelta(days=1)
DEFAULT = 7 * DAY
MAX_DAYS = 731
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)

KEYS = {"device": ("device_id", "name", "site"), "site": ("site",), "fleet": ()}
SUMS = ("share", "days", "days_missing", *(f"{part}_minutes" for part in PARTS), "battery_least", "flaps", "reboots")


async def get_uptime(request: web.Request) -> web.StreamResponse:
    """Return a page of uptimes; with format=csv, all of them. `next` is the `after` of the following page, null on the
    last one."""
    by = query.choice(request, "by", tuple(KEYS))
    now = request.app[OPERATOR_API].now()
    chosen = _chosen(request, now)
    if query.choice(request, "format", ("json", "csv")) == "csv":
        _refuse(request, "is not accepted with format=csv, which has all rows", "limit", "after")
        left_out = () if by == "device" else ("left_out",)
        return await stream_csv(request, (*KEYS[by], *SUMS, *left_out), _pages(request, chosen, by), "uptime.csv")
    if by == "fleet":
        _refuse(request, "is not accepted with by=fleet, which has one row", "limit", "after")
    limit, after = query.number(request, "limit", MAX_PAGE, 1, MAX_PAGE), query.text(request, "after")
    page = await _page(request, chosen, by, limit, after)
    return json_response(
        {
            "from": chosen.start, "to": chosen.end, "by": by, "as_of": now,
            "uptime": page.rows, "left_out": page.left_out, "next": page.next,
        }
    )  # fmt: skip


def _refuse(request: web.Request, reason: str, *names: str) -> None:
    for name in names:
        if name in request.query:
            raise query.invalid(name, reason)


def _chosen(request: web.Request, now: datetime) -> UptimeQuery:
    """Parse the parameters. Raise a 400 Problem."""
    tomorrow = now.date() + DAY
    end = min(_day(request, "to", tomorrow, is_end=True), tomorrow)
    start = _day(request, "from", end - DEFAULT, is_end=False)
    if start >= tomorrow:
        raise query.invalid("from", "must not be in the future")
    if start >= end:
        raise query.invalid("to", "must be later than `from`")
    if end - start > MAX_DAYS * DAY:
        raise query.invalid("from", f"must be at most {MAX_DAYS} days before `to`")
    site, device = query.text(request, "site"), query.text(request, "device")
    tag = query.text(request, "tag", registry.MAX_TAG_CHARS)
    return UptimeQuery(start, end, now, [site] if site else None, tag or None, device or None)


def _day(request: web.Request, name: str, default: date, *, is_end: bool) -> date:
    """Return a UTC day. A time with a zone stands for the day that contains it; at the end of a range, the day begins
    at that time or after it, so that a range of times becomes the days that contain it."""
    text = request.query.get(name)
    if text is None:
        return default
    if _DAY.fullmatch(text):
        with suppress(ValueError):
            return date.fromisoformat(text)
    try:
        moment = query.moment(request, name, midnight(default))
    except Problem:
        raise query.invalid(name, "must be a UTC day, such as 2026-11-24, or a time with zone") from None
    day = moment.date()
    return day + DAY * (is_end and moment > midnight(day))


async def _pages(request: web.Request, chosen: UptimeQuery, by: str) -> AsyncIterator[Sequence[dict[str, Any]]]:
    after: str | None = ""
    while after is not None:
        rows, after, _ = await _page(request, chosen, by, MAX_PAGE, after)
        yield rows


async def _page(request: web.Request, chosen: UptimeQuery, by: str, limit: int, after: str) -> UptimePage:
    reads = request.app[OPERATOR_API].uptime
    try:
        if by == "device":
            return await reads.by_device(chosen, limit, after or None)
        return await (reads.fleet(chosen) if by == "fleet" else reads.by_site(chosen, limit, after or None))
    except UnknownSite as error:
        raise query.invalid("site", f"names no site that exists or existed: {error.detail[:-1]}") from None
