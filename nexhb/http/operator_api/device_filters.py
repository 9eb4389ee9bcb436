"""The parameters that limit and sort lists of devices, and the positions of their pages."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from aiohttp import web

from nexhb.devices import registry
from nexhb.http.transport import query
from nexhb.reading.queries import (
    BY_DEVICE_ID,
    FIRST_KEY,
    LATEST_HEARD,
    SORTS,
    STATES,
    DeviceFilter,
    KeyPosition,
    PagePosition,
)

NAMES = (
    "state", "site", "tag", "q", "battery_below", "clock_wrong", "limited", "agent_version", "agent_version_below",
    "unity_pkg_version", "unity_pkg_version_below", "sort",
)  # fmt: skip
# How long a device counts as limited after the rate limit has refused it. Daemons write refusals once a minute.
LIMITED_FOR = timedelta(minutes=10)
MAX_VERSION_CHARS = 50
_VERSION = re.compile(r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){0,9})", re.ASCII)
_PLACE = re.compile(r"((?:19[7-9]|2[01]\d)\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)/(.+)", re.ASCII | re.DOTALL)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)


def chosen(request: web.Request, now: datetime) -> DeviceFilter:
    """Parse the parameters that limit a list. A site that does not exist has no devices. Raise a 400 Problem."""
    site = query.text(request, "site")
    state = query.choice(request, "state", STATES) if request.query.get("state") else ""
    battery_below = query.number(request, "battery_below", 0, 1, 100)
    return DeviceFilter(
        sites=(site,) if site else None,
        tag=query.text(request, "tag", registry.MAX_TAG_CHARS) or None,
        limited_since=now - LIMITED_FOR if _given(request, "limited") else None,
        text=query.text(request, "q"),
        state=state,
        battery_below=battery_below or None,
        clock_wrong=_given(request, "clock_wrong"),
        agent_version=query.text(request, "agent_version", MAX_VERSION_CHARS) or None,
        agent_version_below=_version(request, "agent_version_below"),
        unity_pkg_version=query.text(request, "unity_pkg_version", MAX_VERSION_CHARS) or None,
        unity_pkg_version_below=_version(request, "unity_pkg_version_below"),
    )


def sort(request: web.Request, default: str) -> str:
    """Parse `sort`. Raise a 400 Problem."""
    return query.choice(request, "sort", (default, *(name for name in SORTS if name != default)))


def _given(request: web.Request, name: str) -> bool | None:
    """Return whether the devices must have a property; None if the parameter is absent or empty."""
    return query.boolean(request, name) if request.query.get(name) else None


def _version(request: web.Request, name: str) -> tuple[int, ...] | None:
    """Return the numbers of a version such as 2.1.0, without the zeros at its end: 2.1 is not below 2.1.0."""
    text = query.text(request, name, MAX_VERSION_CHARS)
    if not text:
        return None
    match = _VERSION.fullmatch(text)
    if match is None:
        raise query.invalid(name, "must be a version of up to ten numbers, such as 2.1.0")
    numbers = [int(number) for number in match[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# ---- positions ------------------------------------------------------------------------------------------------------


def after_row(text: str) -> PagePosition | None:
    """Parse `after`, the `next` of the previous page of a list that is sorted by heard_at. Raise a 400 Problem."""
    if not text:
        return None
    match = _PLACE.fullmatch(text)
    with suppress(ValueError):
        if match:
            return PagePosition(datetime.fromisoformat(match[1]), match[2])
    raise query.invalid("after", "must be the `next` of the previous page")


def after_key(text: str, sorted_by: str) -> KeyPosition:
    """Parse `after`, the `next` of the previous page of a list that is sorted by this column. Raise a 400 Problem."""
    if sorted_by == BY_DEVICE_ID:
        return KeyPosition(0, text)
    position = after_row(text)
    if position is None:
        return FIRST_KEY
    key = (position.heard_at - _EPOCH) // _US
    return KeyPosition(-key if sorted_by == LATEST_HEARD else key, position.device_id)


def next_row(position: PagePosition | None) -> str | None:
    """Return the `next` of a list that is sorted by heard_at."""
    return position and f"{position.heard_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}/{position.device_id}"


def next_key(position: KeyPosition | None, sorted_by: str) -> str | None:
    """Return the `next` of a list that is sorted by this column. A percentage is written as a time, too."""
    if position is None:
        return None
    if sorted_by == BY_DEVICE_ID:
        return position.device_id
    return next_row(PagePosition(_EPOCH + abs(position.key) * _US, position.device_id))
