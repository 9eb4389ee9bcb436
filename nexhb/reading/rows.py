"""The rows of a result, made from the records of a query."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from nexhb.devices.presence import Presence
from nexhb.heartbeat import CONTENT


def total(records: list[asyncpg.Record]) -> int:
    """Return the number of rows that the query has without its limit; each record contains this number."""
    return records[0]["total"] if records else 0


def numbers(records: list[asyncpg.Record]) -> list[int]:
    """Return the device_no of each record."""
    return [record["device_no"] for record in records]


def clock_skew_s(last_ts: datetime | None, received_at: datetime, clock_wrong: bool) -> int | None:
    """Return by how many seconds a device's clock is ahead (negative: slow), judging by its last heartbeat. Return None
    if there is no heartbeat, or the clock is outside the accept window. If the heartbeat waited in a queue, the clock
    looks slow."""
    if last_ts is None or clock_wrong:
        return None
    return round((last_ts - received_at).total_seconds())


NOT_SHOWN = ("device_no", "total")
WATCHED = ("site", "since", "incident_id", "silenced")  # attributes of rows of lists that other tables fill in


# A list has thousands of rows, and the work on them delays heartbeats. As a dict, a row took 0.7 µs to create and
# 0.3 µs to encode as JSON; as an object with slots, it takes 0.25 and 0.14 µs.
@functools.cache
def _row_type(columns: tuple[str, ...]) -> Callable[..., Any]:
    return msgspec.defstruct("Listed", [(column, Any, None) for column in columns], gc=False)


def _row_objects(records: list[asyncpg.Record], *computed: str) -> list[Any]:
    """Return objects with the columns of the records, except the last columns device_no and total, and with the
    attributes named `computed`, which are None."""
    if not records:
        return []
    columns = [column for column in records[0].keys() if column not in NOT_SHOWN]  # noqa: SIM118 - a Record iterates values
    make, width = _row_type((*columns, *computed)), len(columns)
    return [make(*record[:width]) for record in records]


def with_silence(records: list[asyncpg.Record], presence: Presence) -> list[Any]:
    """Return row objects with clock_skew_seconds and offline_seconds, and with attributes that other tables fill in."""
    rows = _row_objects(records, *WATCHED, "cause", "clock_skew_seconds", "offline_seconds")
    for row in rows:
        row.clock_skew_seconds = clock_skew_s(row.last_ts, row.received_at, row.clock_wrong)
        row.offline_seconds = int(presence.silence(row.heard_at).total_seconds())
    return rows


def with_online(
    records: list[asyncpg.Record], presence: Presence, online_within: timedelta, *computed: str
) -> list[Any]:
    """Return row objects with clock_skew_seconds, online and state, and with the attributes `computed`, which are
    None."""
    rows = _row_objects(records, *computed, "clock_skew_seconds", "online", "state")
    return _set_online(rows, presence, online_within)


_STATUS = ("last_ts", "heard_at", "received_at", *(column.name for column in CONTENT), "clock_wrong", "status")
LISTED_DEVICE = (
    "device_id", "name", "alias", "site", "tags", *_STATUS, "clock_skew_seconds", "online", "state", "silenced",
)  # fmt: skip


def devices_with_status(
    devices: list[asyncpg.Record], statuses: list[asyncpg.Record], presence: Presence, online_within: timedelta
) -> list[Any]:
    """Return a row object for each of the devices, with its status, clock_skew_seconds, online and state."""
    by_number = {record["device_no"]: record[1:] for record in statuses}
    never_seen = (*[None] * (len(_STATUS) - 1), "never_seen")
    make = _row_type(LISTED_DEVICE)
    rows = [make(*device[1:6], *by_number.get(device["device_no"], never_seen)) for device in devices]
    for device, row in zip(devices, rows, strict=True):
        if device["revoked"]:
            row.status = "revoked"
    return _set_online(rows, presence, online_within)


def _set_online(rows: list[Any], presence: Presence, online_within: timedelta) -> list[Any]:
    for row in rows:
        row.clock_skew_seconds = clock_skew_s(row.last_ts, row.received_at, row.clock_wrong)
        row.online = row.heard_at is not None and presence.is_online(row.heard_at, online_within)
        status = getattr(row, "status", "ok")  # lists of devices whose status is ok do not have the column
        row.state = presence.state(row.heard_at, online_within) if status == "ok" else status
    return rows
