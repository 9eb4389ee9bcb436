"""Determine the time zone of the times in NexMDM's database. Its columns have no time zone, so PostgreSQL stored each
time in the zone of the session that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

import asyncpg

from nexhb.errors import BadInput
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.texts import quoted

_Q = sql.queries("nexmdm")

RepeatedHour = Literal["first", "second", "by-id"]
ALL_FIRST, ALL_SECOND = 2**63 - 1, -(2**63)  # for Fold.split: all rows belong to the first pass, or to the second
COMPARED_OVER = timedelta(days=400)  # zones whose offsets were equal for this long count as the same zone
OWN = ("user", "database user", "client", "session")  # sources of a session's setting that hide the server's setting
NO_REPEATED_HOUR = (datetime(9999, 1, 1, tzinfo=UTC), timedelta(0), ALL_SECOND)


class Zone(NamedTuple):
    """The name that PostgreSQL gives to a time zone, and the setting from which it comes."""

    name: str
    set_by: str


class Change(NamedTuple):
    """A change of a zone's offset from UTC, which repeats or skips a local time."""

    at: datetime
    before: timedelta
    after: timedelta

    @property
    def length(self) -> timedelta:
        """The length of the local time that is repeated or skipped."""
        return abs(self.before - self.after)

    @property
    def local(self) -> tuple[datetime, datetime]:
        """The start and end of the repeated or skipped local time, as a column without a time zone stores them."""
        start, end = sorted((self.at + self.before, self.at + self.after))
        return start.replace(tzinfo=None), end.replace(tzinfo=None)

    @property
    def repeats(self) -> bool:
        """Whether the change repeats a local time; otherwise it skips a local time, which never occurs."""
        return self.after < self.before

    def shown(self) -> str:
        """Return the repeated or skipped local time as text for people."""
        start, end = self.local
        return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M}"


class Fold(NamedTuple):
    """A local time that occurred twice. PostgreSQL reads it as a time of the second pass, which begins at `start`."""

    start: datetime
    length: timedelta
    split: int  # rows with a lower hb_id belong to the first pass, all others to the second

    def overlaps(self, start: datetime, end: datetime) -> bool:
        """Return whether a row with `start` ≤ ts < `end` may belong to this local time."""
        return self.start < end and self.start + self.length > start


async def find(conn: Connection, given: str | None, *, matters: bool) -> Zone:
    """Return the time zone of the sessions that write the heartbeats, and set it in the session of `conn`. The zone is
    `given`, or follows from the settings of role, database and server. If these are ambiguous and the zone `matters`,
    raise BadInput."""
    if given is not None:
        return Zone(await use(conn, given), "--source-timezone")
    server = await conn.fetchrow(_Q["own_zone"])
    assert server is not None  # noqa: S101 - a SELECT without FROM has one row
    is_hidden = server["source"] in OWN
    zones: dict[str, str] = {}
    for row in await conn.fetch(_Q["zones"]):
        if row["zone"] is None and is_hidden and matters:
            raise BadInput(
                f"the time zone of the source's server is not visible: this role sets its own ({server['zone']}).",
                hint="Run ALTER ROLE … RESET timezone for this role, or give --source-timezone.",
            )
        zones.setdefault(row["zone"] or server["zone"], f"the role {quoted(row['role'])}, by {row['set_by']}")
    names = list(zones)
    if matters and not await _are_same(conn, names):
        listed = "; ".join(f"{name} ({by})" for name, by in zones.items())
        raise BadInput(
            f"the roles that may write the source's heartbeats have different time zones: {listed}.",
            hint="Give --source-timezone: the zone of the role with which NexMDM connects.",
        )
    return Zone(await use(conn, names[0]), zones[names[0]])


async def use(conn: Connection, zone: str) -> str:
    """Make the session read times without a zone as times of this zone, and return the zone's name. Raise BadInput if
    the source does not know the zone."""
    try:
        return str(await conn.fetchval(_Q["use_zone"], zone))
    except asyncpg.InvalidParameterValueError:
        raise BadInput(
            f"the source does not know the time zone {quoted(zone)}.",
            hint="`SELECT name FROM pg_timezone_names` lists the zones that it knows.",
        ) from None


async def changes(conn: Connection, since: datetime, until: datetime) -> list[Change]:
    """Return the changes of the session's zone. The first entry is no change, but gives the offset at `since`."""
    return [Change(*row) for row in await conn.fetch(_Q["changes"], since, until)]


async def is_same(conn: Connection, zone: str, session_zone: str, since: datetime, until: datetime) -> bool:
    """Return whether two zones had the same offsets; false if `zone` is unknown. The session keeps the zone
    `session_zone`."""
    if zone == session_zone:
        return True
    try:
        await use(conn, zone)
        zone_changes = await changes(conn, since, until)
    except BadInput:
        return False
    finally:
        await use(conn, session_zone)
    return zone_changes == await changes(conn, since, until)


async def _are_same(conn: Connection, names: Sequence[str]) -> bool:
    now = await conn.fetchval(_Q["clock"])
    return all([await is_same(conn, name, names[0], now - COMPARED_OVER, now) for name in names])


async def folds(
    conn: Connection, zone_changes: Iterable[Change], now: datetime, chosen: RepeatedHour | None
) -> tuple[Fold, ...]:
    """Return each repeated hour that has rows, with the row that divides its two passes. Raise BadInput if rows have a
    local time that never occurred, or if it is unknown to which pass the rows of a repeated hour belong."""
    repeated = []
    for change in zone_changes:
        if not change.length or not (rows := await conn.fetchval(_Q["stamped"], *change.local)):
            continue
        if not change.repeats:
            raise BadInput(
                f"{rows:,} heartbeats are stamped {change.shown()}, which this time zone skipped: "
                "they were written in another time zone.",
                hint="Give --source-timezone.",
            )
        repeated.append(Fold(change.at, change.length, await _split(conn, change, rows, now, chosen)))
    return tuple(repeated)


async def _split(conn: Connection, change: Change, rows: int, now: datetime, chosen: RepeatedHour | None) -> int:
    problem = f"{rows:,} heartbeats are stamped {change.shown()}, an hour that occurred twice"
    if change.at - change.length <= now < change.at + change.length:
        raise BadInput(f"{problem} and is not over.", hint=f"Run it again after {change.at + change.length:%H:%M} UTC.")
    if chosen is None:
        raise BadInput(
            f"{problem} when daylight saving time ended.",
            hint="Give --repeated-hour by-id (in the order in which they were written), first or second.",
        )
    if chosen == "second":
        return ALL_SECOND
    if (change.at - change.length).date() != (change.at + change.length - timedelta.resolution).date():
        raise BadInput(f"{problem}, on both sides of midnight UTC.", hint="Give --repeated-hour second.")
    if chosen == "first":
        return ALL_FIRST
    split = await conn.fetchval(_Q["split"], *change.local)
    if split is None:
        raise BadInput(
            f"{problem}, and the order of their hb_id does not show to which pass they belong.",
            hint="Give --repeated-hour first or second.",
        )
    return int(split)
