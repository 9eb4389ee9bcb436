"""The queries that device_last_status and the history both answer, and the form of their results. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

UNITY_DOWN_WINDOW = timedelta(hours=24)  # a device without a heartbeat in this time is not listed as "Unity down"


class PagePosition(NamedTuple):
    """The last row of a page of a list; the next page starts after it."""

    heard_at: datetime
    device_id: str


FIRST_POSITION = PagePosition(datetime(1970, 1, 1, tzinfo=UTC), "")
LAST_POSITION = PagePosition(datetime(2200, 1, 1, tzinfo=UTC), "")


class DeviceFilter(NamedTuple):
    """The devices that a list is limited to."""

    sites: tuple[str, ...] | None = None  # None: with any site, or none
    tag: str | None = None


EVERY_DEVICE = DeviceFilter()


class OfflineQuery(NamedTuple):
    """Devices that have been silent for longer than `silent_for`, the longest silent first."""

    silent_for: timedelta
    limit: int
    after: PagePosition | None = None
    among: DeviceFilter = EVERY_DEVICE
    name: str = "offline"


class UnityDownQuery(NamedTuple):
    """Devices with a heartbeat in the last 24 h on which Unity does not run, the latest heard_at first, and whether
    each is online."""

    online_within: timedelta
    limit: int
    after: PagePosition | None = None
    among: DeviceFilter = EVERY_DEVICE
    name: str = "unity_down"


class DeviceQuery(NamedTuple):
    """A device and its last status."""

    device_id: str
    online_within: timedelta
    name: str = "device"


Query = OfflineQuery | UnityDownQuery | DeviceQuery


@dataclass(frozen=True)
class ReadResult:
    """The total count and the rows of a query. Rows are objects with the columns as attributes. Rows with the same
    columns have the same type, so that rows of both sources can be equal."""

    count: int
    rows: list[Any]
    next_position: PagePosition | None = None  # position of the last row, if more rows follow
    numbers: list[int] = field(default_factory=list)  # device_no of each row of a list


def start_of(query: OfflineQuery | UnityDownQuery) -> PagePosition:
    """Return the position after which the page starts; for the first page, a position before every row."""
    return query.after or (FIRST_POSITION if isinstance(query, OfflineQuery) else LAST_POSITION)


def page_of(query: OfflineQuery | UnityDownQuery, count: int, rows: list[Any], numbers: list[int]) -> ReadResult:
    """Return the page with the first `query.limit` of `rows`, whose devices have these numbers. If `rows` has one more,
    there is a next page."""
    has_more = len(rows) > query.limit
    rows = rows[: query.limit]
    position = PagePosition(rows[-1].heard_at, rows[-1].device_id) if has_more else None
    return ReadResult(count, rows, position, numbers[: query.limit])
