"""Reads of what the watcher recorded: events, incidents, and the timeline of a device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from nexhb.errors import UnknownDevice
from nexhb.postgres import sql
from nexhb.reading.reads import Reads, Row
from nexhb.texts import quoted

_Q = sql.queries("events")

MAX_NUMBER = 2**63 - 1
MAX_OUTAGES = 1_000


@dataclass(frozen=True)
class EventFilter:
    """Which events to return: start ≤ at < end. None stands for all."""

    start: datetime
    end: datetime
    sites: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    device_id: str | None = None


class IncidentPosition(NamedTuple):
    """A place in the order in which incidents change."""

    changed_at: datetime
    incident_id: int


@dataclass(frozen=True)
class Interval:
    """A time in which the state of a device did not change. `until` is None while it lasts."""

    state: str  # online | offline | unknown
    since: datetime
    until: datetime | None
    cause: str | None = None
    settled: bool | None = None  # whether the cause of an outage is final
    incident_id: int | None = None


class EventReads:
    """The reads, on the connections of the other reads. `sites` is the scope of the caller; None: every site."""

    def __init__(self, reads: Reads) -> None:
        self._acquired = reads.acquired

    async def events(self, chosen: EventFilter, limit: int, after: int | None, *, ascending: bool) -> list[Row]:
        """Return a page of events, newest first unless `ascending`, starting after the event_id `after`. Raise
        UnknownDevice."""
        query = _Q["events_ascending"] if ascending else _Q["events"]
        place = after if after is not None else (0 if ascending else MAX_NUMBER)
        async with self._acquired("events") as conn:
            device_no = None
            if chosen.device_id is not None:
                device_no = await _device_no(conn, chosen.device_id, chosen.sites)
            rows = await conn.fetch(
                query, chosen.start, chosen.end, chosen.sites, chosen.kinds, device_no, place, limit
            )
        return [_with_evidence(row) for row in rows]

    async def newest(self) -> tuple[int, datetime | None]:
        """Return the event_id of the newest event, 0 if there is none, and the time of the watcher's last complete
        round, None if there was none."""
        async with self._acquired("events") as conn:
            [row] = await conn.fetch(_Q["newest"])
            return row["event_id"], row["round_at"]

    async def recorded_at(self, event_id: int) -> datetime | None:
        """Return when this event, or the last one before it, was recorded."""
        async with self._acquired("events") as conn:
            at: datetime | None = await conn.fetchval(_Q["recorded_at"], event_id)
            return at

    async def changed_incidents(
        self, chosen: EventFilter, after: IncidentPosition, limit: int
    ) -> tuple[list[Row], datetime | None]:
        """Return the incidents that were opened, widened or resolved after a position, in this order, and the time of
        the watcher's last complete round. Each has `change` and `changed_at`. Raise UnknownDevice."""
        async with self._acquired("events") as conn:
            device_no = None
            if chosen.device_id is not None:
                device_no = await _device_no(conn, chosen.device_id, chosen.sites)
            [newest] = await conn.fetch(_Q["newest"])
            round_at: datetime | None = newest["round_at"]
            if round_at is None:
                return [], None
            rows = await conn.fetch(
                _Q["changed_incidents"], *after, round_at, chosen.sites, chosen.kinds, device_no, limit
            )
        return [_with_evidence(row) for row in rows], round_at

    async def incidents(
        self, *, open_only: bool, limit: int, after: int | None, sites: Sequence[str] | None = None
    ) -> list[Row]:
        """Return a page of incidents, newest first, starting after the incident_id `after`."""
        async with self._acquired("incidents") as conn:
            place = MAX_NUMBER if after is None else after
            rows = await conn.fetch(_Q["incidents"], open_only, sites, place, limit)
        return [_with_evidence(row) for row in rows]

    async def timeline(
        self, device_id: str, start: datetime, end: datetime, sites: Sequence[str] | None = None
    ) -> tuple[list[Interval], bool]:
        """Return the intervals of a device from `start` to `end`, oldest first, and whether more were left out. Raise
        UnknownDevice."""
        async with self._acquired("timeline") as conn:
            device = await conn.fetchrow(_Q["watched_device"], device_id)
            if device is None or (sites is not None and device["site"] not in sites):
                raise UnknownDevice(f"{quoted(device_id)}.")
            rows = await conn.fetch(_Q["outages"], device["device_no"], start, end, MAX_OUTAGES + 1)
        return intervals(device, rows[:MAX_OUTAGES], start, end), len(rows) > MAX_OUTAGES


async def _device_no(conn: Any, device_id: str, sites: Sequence[str] | None) -> int:
    device = await conn.fetchrow(_Q["watched_device"], device_id)
    if device is None or (sites is not None and device["site"] not in sites):
        raise UnknownDevice(f"{quoted(device_id)}.")
    number: int = device["device_no"]
    return number


def intervals(device: Any, outages: Sequence[Any], start: datetime, end: datetime) -> list[Interval]:
    """Return the intervals of a device between `start` and `end`. Before the watcher knew the device, its state is
    unknown; so it is while it is offline without a recorded outage, which the watcher has adopted."""
    known_since = max((at for at in (device["created_at"], device["adopted_at"]) if at is not None), default=end)
    found: list[Interval] = []
    position = start
    if known_since > start:
        position = min(known_since, end)
        found.append(Interval("unknown", start, position))
    for row in outages:
        since, until = max(row["since"], position), row["until"]
        if since > position:
            found.append(Interval("online", position, since))
        found.append(Interval("offline", since, until, row["cause"], row["settled_at"] is not None, row["incident_id"]))
        position = end if until is None else min(max(until, position), end)
    if not outages or outages[-1]["until"] is not None:
        state = "online" if device["presence"] == "online" else "unknown"
        found.append(Interval(state, position, None))
    return found


def _with_evidence(row: Any) -> Row:
    return {**row, "evidence": json.loads(row["evidence"])}
