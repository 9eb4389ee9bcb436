"""Silences: periods in which no messages are sent about the fleet, a site, a tag or a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nexhb.devices.hours import Hours
from nexhb.errors import BadInput
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection

_Q = sql.queries("messages")
_EXISTS = {"site": _Q["has_site"], "tag": _Q["has_tag"], "device": _Q["has_device"]}  # by scope

SCOPES = ("fleet", "site", "tag", "device")
MAX_SILENCES = 1_000  # that have not ended
KEPT = timedelta(days=90)  # after their end
MAX_LENGTH = timedelta(days=3660)


@dataclass(frozen=True, slots=True)
class Silence:
    """A silence that is not stored yet. With `hours`, it recurs in these hours."""

    scope: str
    value: str | None
    start: datetime
    until: datetime | None
    hours: str | None
    zone: str | None
    reason: str
    created_by: str


@dataclass(frozen=True, slots=True)
class InForce:
    """The silences that are in force: for each scope and value, until when, or True without an end. The value of the
    scope `fleet` is an empty text."""

    until: Mapping[str, Mapping[str, datetime | bool]]

    def __bool__(self) -> bool:
        return any(self.until.values())

    def of(
        self, device_id: str | None = None, site: str | None = None, tags: Iterable[str] = ()
    ) -> datetime | bool | None:
        """Return until when a device or a site is silenced: the end of the last of its silences, True if one of them
        has no end, None if there is none."""
        values = [("fleet", ""), ("site", site), ("device", device_id), *(("tag", tag) for tag in tags)]
        ends = [self.until[scope][value] for scope, value in values if value is not None and value in self.until[scope]]
        return latest(ends)


def latest(ends: Sequence[datetime | bool]) -> datetime | bool | None:
    """Return the last of these ends: True if one of them is True, None if there are none."""
    times = [end for end in ends if isinstance(end, datetime)]
    return True if len(times) < len(ends) else max(times, default=None)


async def in_force(conn: AnyConnection, now: datetime) -> InForce:
    """Return the silences that are in force now."""
    until: dict[str, dict[str, datetime | bool]] = {scope: {} for scope in SCOPES}
    for row in await conn.fetch(_Q["silences"], now, 0, MAX_SILENCES):
        if is_active(row, now):
            known = until[row["scope"]]
            value = row["value"] or ""
            known[value] = latest([_end(row, now), *([known[value]] if value in known else [])]) or True
    return InForce(until)


def _end(row: Any, now: datetime) -> datetime | bool:
    """Return when a silence that is in force ends; one that recurs, when its present hours end."""
    change = None if row["hours"] is None else Hours.stored(row["hours"], row["zone"]).next_change(now)
    return min((at for at in (row["until"], change) if at is not None), default=True)


async def tags_of(conn: AnyConnection, device_ids: Sequence[str], silenced: InForce) -> Mapping[str, Sequence[str]]:
    """Return the tags of those of these devices that have a silenced tag."""
    if not silenced.until["tag"]:
        return {}
    rows = await conn.fetch(_Q["devices_tagged"], device_ids, sorted(silenced.until["tag"]))
    return {row["device_id"]: row["tags"] for row in rows}


async def whole(conn: AnyConnection, incident_ids: Sequence[int], silenced: InForce) -> set[int]:
    """Return those of these incidents all of whose devices are silenced by site, tag or device."""
    values = [sorted(silenced.until[scope]) for scope in ("site", "tag", "device")]
    if not incident_ids or not any(values):
        return set()
    return {row["incident_id"] for row in await conn.fetch(_Q["silenced"], incident_ids, *values)}


def is_active(row: Any, now: datetime) -> bool:
    """Return whether a stored silence is in force now. A silence whose hours cannot be read silences nothing: `nexhb
    doctor` reports it."""
    if now < row["from"] or (row["until"] is not None and row["until"] <= now):
        return False
    if row["hours"] is None:
        return True
    try:
        return Hours.parse(row["hours"], row["zone"]).is_open(now)
    except BadInput:
        return False


async def listed(conn: AnyConnection, ended_after: datetime | None, after: int, limit: int) -> Sequence[dict[str, Any]]:
    """Return silences in the order in which they were made."""
    return [dict(row) for row in await conn.fetch(_Q["silences"], ended_after, after, limit)]


async def check(conn: AnyConnection, silence: Silence, now: datetime) -> None:
    """Raise BadInput, which names the field, unless the silence can be added."""
    _check_time(silence, now)
    if silence.scope == "fleet":
        if silence.value is not None:
            raise BadInput("value must be absent for the fleet.", field="value")
    elif silence.value is None or not await conn.fetchval(_EXISTS[silence.scope], silence.value):
        raise BadInput(f"value names no {silence.scope}.", field="value")
    if await conn.fetchval(_Q["count_silences"], now) >= MAX_SILENCES:
        raise BadInput(f"There are {MAX_SILENCES:,} silences already.", hint="Remove some of them.")


def _check_time(silence: Silence, now: datetime) -> None:
    if silence.hours is not None:
        Hours.parse(silence.hours, silence.zone or "UTC")
    if abs(silence.start - now) > MAX_LENGTH:
        raise BadInput("from must be within ten years from now.", field="from")
    if silence.until is None:
        if silence.hours is None:
            raise BadInput("until is required, unless the silence recurs.", field="until")
    elif silence.until <= silence.start:
        raise BadInput("until must be after the beginning.", field="until")
    elif not now < silence.until <= now + MAX_LENGTH:
        raise BadInput("until must be in the future, and within ten years.", field="until")


async def add(conn: AnyConnection, silence: Silence, now: datetime) -> dict[str, Any]:
    """Add a silence, and return it. Raise BadInput, which names the field."""
    await check(conn, silence, now)
    await conn.execute(_Q["prune_silences"], now - KEPT)
    row = await conn.fetchrow(
        _Q["add_silence"], silence.scope, silence.value, silence.start, silence.until, silence.hours,
        silence.zone if silence.hours else None, silence.reason, silence.created_by, now,
    )  # fmt: skip
    assert row is not None  # noqa: S101 - INSERT … RETURNING returns its row
    return dict(row)


async def remove(conn: AnyConnection, silence_id: int) -> bool:
    """Remove a silence. Return whether there was one."""
    return await conn.fetchval(_Q["remove_silence"], silence_id) is not None
