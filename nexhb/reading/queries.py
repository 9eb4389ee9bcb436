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


# The states by which lists can be limited. `unity_down` overlaps with the first three, which exclude each other.
IN_STATUS = ("online", "offline", "unknown", "unity_down", "inactive")  # read from device_last_status
STATES = (*IN_STATUS, "never_seen", "revoked")
BY_DEVICE_ID, LONGEST_SILENT, LATEST_HEARD, BY_BATTERY = "device_id", "heard_at", "-heard_at", "battery_pct"
SORTS = (BY_DEVICE_ID, LONGEST_SILENT, LATEST_HEARD, BY_BATTERY)


class DeviceFilter(NamedTuple):
    """The devices that a list is limited to. None, or an empty text: not limited by this."""

    sites: tuple[str, ...] | None = None
    tag: str | None = None
    limited_since: datetime | None = None  # only devices that the rate limit has refused since then
    text: str = ""  # part of the id, the name or the alias, in upper or lower case
    state: str = ""
    battery_below: int | None = None
    clock_wrong: bool | None = None
    agent_version: str | None = None
    agent_version_below: tuple[int, ...] | None = None
    unity_pkg_version: str | None = None
    unity_pkg_version_below: tuple[int, ...] | None = None

    @property
    def by_number(self) -> DeviceFilter:
        """The part of the filter that tables other than device_last_status answer, by the numbers of devices."""
        return DeviceFilter(self.sites, self.tag, self.limited_since)

    @property
    def by_device(self) -> DeviceFilter:
        """The part that device_last_status is not needed for."""
        return DeviceFilter(self.sites, self.tag, self.limited_since, self.text)


EVERY_DEVICE = DeviceFilter()


class KeyPosition(NamedTuple):
    """The last row of a page of a list that is sorted by a number; the next page starts after it."""

    key: int  # µs since 1970, negative for the latest first; percent; 0 if the list is sorted by device_id
    device_id: str


FIRST_KEY = KeyPosition(-(2**63), "")


class StatusQuery(NamedTuple):
    """Devices in the order of a column, limited by what is known of their last status. Without a state, they are those
    with the status `ok`."""

    limit: int
    among: DeviceFilter
    sort: str
    after: KeyPosition = FIRST_KEY
    silent_for: timedelta | None = None  # only devices that have been silent for longer
    unity_down: bool = False  # only devices that a UnityDownQuery lists
    counted: bool = False

    @property
    def needs_status(self) -> bool:
        """Whether devices without a last status cannot be in the list."""
        is_by_device = self.among._replace(state="") == self.among.by_device and self.sort == BY_DEVICE_ID
        return not is_by_device or self.among.state in IN_STATUS


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
    next_position: PagePosition | KeyPosition | None = None  # position of the last row, if more rows follow
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
