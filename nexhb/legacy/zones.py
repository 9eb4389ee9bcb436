"""In which time zone NexMDM's database keeps its times: its columns have none, so PostgreSQL stored each moment in the
zone of the session that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

import asyncpg

from nexhb import sql
from nexhb.db import Connection
from nexhb.errors import BadInput
from nexhb.texts import quoted

_Q = sql.queries("nexmdm")

Repeated = Literal["first", "second", "by-id"]
ALL_FIRST, ALL_SECOND = 2**63 - 1, -(2**63)  # hb_ids below which a row of a repeated hour is of its first pass
COMPARED_OVER = timedelta(days=400)  # two names are the same zone where their offsets were the same so long
OWN = ("user", "database user", "client", "session")  # of a session's setting: the server's own is not to be seen
NO_HOUR_IS_REPEATED = (datetime(9999, 1, 1, tzinfo=UTC), timedelta(0), ALL_SECOND)


class Zone(NamedTuple):
    """A time zone by the name that PostgreSQL has for it, and what says so."""

    name: str
    said_by: str


class Change(NamedTuple):
    """The moment from which a zone has another offset from UTC."""

    at: datetime
    before: timedelta
    after: timedelta

    @property
    def length(self) -> timedelta:
        """Of the local time that is repeated, or left out."""
        return abs(self.before - self.after)

    @property
    def local(self) -> tuple[datetime, datetime]:
        """That local time, as a column without a zone has it."""
        start, end = sorted((self.at + self.before, self.at + self.after))
        return start.replace(tzinfo=None), end.replace(tzinfo=None)

    @property
    def repeats(self) -> bool:
        """Whether that local time is there twice; else it is never there."""
        return self.after < self.before

    def shown(self) -> str:
        """For people."""
        start, end = self.local
        return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M}"


class Fold(NamedTuple):
    """A local time that was there twice. PostgreSQL reads such a row as of the second pass, which begins at `start`."""

    start: datetime
    length: timedelta
    split: int  # rows with a lower hb_id are of the first pass

    def touches(self, start: datetime, end: datetime) -> bool:
        """Whether rows of it are read with those from `start` to before `end`."""
        return self.start < end and self.start + self.length > start


async def find(conn: Connection, wanted: str | None, *, matters: bool) -> Zone:
    """The zone of the sessions that write the heartbeats: `wanted`, or as the role, the database and the server have
    it. The session `conn` is set to it. Raises BadInput where that is not clear, unless it does not matter."""
    if wanted is not None:
        return Zone(await use(conn, wanted), "--source-timezone")
    server = await conn.fetchrow(_Q["own_zone"])
    assert server is not None  # noqa: S101 - a SELECT without FROM has one row
    is_hidden = server["source"] in OWN
    found: dict[str, str] = {}
    for row in await conn.fetch(_Q["zones"]):
        if row["zone"] is None and is_hidden and matters:
            raise BadInput(
                f"the time zone of the source's server is not visible: this role sets its own ({server['zone']}).",
                hint="Run ALTER ROLE … RESET timezone for this role, or give --source-timezone.",
            )
        found.setdefault(row["zone"] or server["zone"], f"the role {quoted(row['role'])}, by {row['set_by']}")
    names = list(found)
    if matters and not await _are_one(conn, names):
        listed = "; ".join(f"{name} ({by})" for name, by in found.items())
        raise BadInput(
            f"the roles that may write the source's heartbeats have different time zones: {listed}.",
            hint="Give --source-timezone: the zone of the role with which NexMDM connects.",
        )
    return Zone(await use(conn, names[0]), found[names[0]])


async def use(conn: Connection, zone: str) -> str:
    """Let the session read times without a zone as of this one; its name. Raises BadInput where there is none."""
    try:
        return str(await conn.fetchval(_Q["use_zone"], zone))
    except asyncpg.InvalidParameterValueError:
        raise BadInput(
            f"the source does not know the time zone {quoted(zone)}.",
            hint="`SELECT name FROM pg_timezone_names` lists those that it knows.",
        ) from None


async def changes(conn: Connection, since: datetime, until: datetime) -> list[Change]:
    """The changes of the session's zone. The first one has the offset from `since` on, and says of no change."""
    return [Change(*row) for row in await conn.fetch(_Q["changes"], since, until)]


async def is_same(conn: Connection, one: str, other: str, since: datetime, until: datetime) -> bool:
    """Whether two zones had the same offsets. The session is left in `other`. One that is not known is another one."""
    if one == other:
        return True
    try:
        await use(conn, one)
        first = await changes(conn, since, until)
    except BadInput:
        return False
    finally:
        await use(conn, other)
    return first == await changes(conn, since, until)


async def _are_one(conn: Connection, names: Sequence[str]) -> bool:
    now = await conn.fetchval(_Q["clock"])
    return all([await is_same(conn, name, names[0], now - COMPARED_OVER, now) for name in names])


async def folds(conn: Connection, found: Iterable[Change], now: datetime, chosen: Repeated | None) -> tuple[Fold, ...]:
    """How the rows of each repeated hour are told apart. Raises BadInput where a row has a time that its zone never
    had, and where a repeated hour has rows and nothing says of which pass they are."""
    told = []
    for change in found:
        if not change.length or not (rows := await conn.fetchval(_Q["stamped"], *change.local)):
            continue
        if not change.repeats:
            raise BadInput(
                f"{rows:,} heartbeats are stamped {change.shown()}, which this time zone left out: "
                "they were written in another one.",
                hint="Give --source-timezone.",
            )
        told.append(Fold(change.at, change.length, await _split(conn, change, rows, now, chosen)))
    return tuple(told)


async def _split(conn: Connection, change: Change, rows: int, now: datetime, chosen: Repeated | None) -> int:
    said = f"{rows:,} heartbeats are stamped {change.shown()}, an hour that was there twice"
    if change.at - change.length <= now < change.at + change.length:
        raise BadInput(f"{said}, and is not over.", hint=f"Run it again after {change.at + change.length:%H:%M} UTC.")
    if chosen is None:
        raise BadInput(
            f"{said} as daylight saving time ended.",
            hint="Give --repeated-hour by-id (in the order in which they were written), first or second.",
        )
    if chosen == "second":
        return ALL_SECOND
    if (change.at - change.length).date() != (change.at + change.length - timedelta.resolution).date():
        raise BadInput(f"{said}, on both sides of midnight UTC.", hint="Give --repeated-hour second.")
    if chosen == "first":
        return ALL_FIRST
    split = await conn.fetchval(_Q["split"], *change.local)
    if split is None:
        raise BadInput(
            f"{said}, and the order of their hb_id does not tell which.",
            hint="Give --repeated-hour first or second.",
        )
    return int(split)
