"""Read every partition with its state, as the plan of the nightly run needs them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

from asyncpg import Record

from nexhb import partitions
from nexhb.jobs import plan
from nexhb.jobs.plan import Day
from nexhb.jobs.runner import MAX_CLOCK_DIFFERENCE
from nexhb.partitions import Partition
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching import device_days

_P = sql.queries("partitions")


async def read_days(conn: Connection, now: datetime | None = None) -> list[Day]:
    """Return every partition in hb_partitions or in PostgreSQL's catalog.

    A count or freeze whose recorded time is later than `now` is ignored: a clock that was ahead recorded it.
    """
    attached = {p.name: p for p in await partitions.attached(conn)}
    late_rows = {row["day"]: row["rows"] for row in await conn.fetch(_P["late"])}
    days = [
        _known_day(row, attached.get(row["partition_name"]), late_rows, now)
        for row in await partitions.recorded(conn)
        if row["attached"]
        == (row["partition_name"] in attached)  # otherwise the partition's bounds are unreadable, and it is skipped
    ]
    known = {day.name for day in days}
    days += [
        Day(p.name, p.start, p.end, "unknown", attached=True, present=True, detach_pending=p.detach_pending)
        for p in attached.values()
        if p.name not in known
    ]
    return days


async def with_uptime_due(conn: Connection, days: list[Day], now: datetime) -> list[Day]:
    """Return the days, each with the reason why its uptimes must be made. Only the table of an ended day is read."""
    ended = {
        each: day.name
        for day in days
        if day.present and day.state != "dropped" and day.end <= now
        for each in plan.dates(day)
    }
    reasons = await device_days.due(conn, list(ended))
    by_name = {ended[each]: reason for each, reason in reasons.items()}
    return [replace(day, uptime_due=by_name.get(day.name, "")) for day in days]


def _known_day(row: Record, attached: Partition | None, late_rows: dict[date, int], now: datetime | None) -> Day:
    """Return a recorded day. If the day is attached, its bounds are taken from PostgreSQL's catalog."""
    start, end = (attached.start, attached.end) if attached else (row["range_start"], row["range_end"])
    return Day(
        name=row["partition_name"],
        start=start,
        end=end,
        state=_state(row, attached),
        attached=attached is not None,
        present=row["present"],
        detach_pending=attached is not None and attached.detach_pending,
        restored=row["restored_at"] is not None,
        counted_at=None if _is_in_the_future(row["counted_at"], now) else row["counted_at"],
        frozen=row["frozen_at"] is not None and not _is_in_the_future(row["frozen_at"], now),
        late=sum(n for day, n in late_rows.items() if start.date() <= day < end.date()),
    )


def _is_in_the_future(moment: datetime | None, now: datetime | None) -> bool:
    return moment is not None and now is not None and moment > now + MAX_CLOCK_DIFFERENCE


def _state(row: Record, attached: Partition | None) -> str:
    state: str = row["state"]
    if attached and state != "dropped":
        same_bounds = (row["range_start"], row["range_end"]) == (attached.start, attached.end)
        # "unknown": somebody attached the partition by hand.
        return state if same_bounds and state != "archived" and not attached.sealed else "unknown"
    if state == "active" and row["archive_url"] and not row["present"]:
        return "dropped"  # the table was restored, then dropped by hand: only the archive is left
    return state
