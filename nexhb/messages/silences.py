"""Silences: periods in which no messages are sent about the fleet, a site, a tag or a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


async def current(conn: AnyConnection, now: datetime) -> Mapping[str, frozenset[str]]:
    """Return the silenced values by scope. For the scope `fleet`, one empty text means that the fleet is silenced."""
    silenced: dict[str, set[str]] = {scope: set() for scope in SCOPES}
    for row in await conn.fetch(_Q["silences"], now, 0, MAX_SILENCES):
        if is_active(row, now):
            silenced[row["scope"]].add(row["value"] or "")
    return {scope: frozenset(values) for scope, values in silenced.items()}


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
