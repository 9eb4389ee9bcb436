"""The place of a device on a day: its site with the opening hours of that day. A day that is made again keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nexhb.devices.hours import Hours
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection, Connection
from nexhb.watching.uptime import Range

_Q = sql.queries("device_days")


@dataclass(frozen=True, slots=True)
class Place:
    """A site with its time zone and opening hours; all None for devices that have no site."""

    site: str | None
    zone: str | None = None
    hours: str | None = None

    def open_ranges(self, start: datetime, end: datetime) -> list[Range]:
        """Return when the site is open. Hours that cannot be read (any more) count as always open."""
        spans = Hours.stored(self.hours, self.zone or "UTC").open_spans(start, end)
        return [Range(span.start.timestamp(), span.end.timestamp()) for span in spans]


async def current(conn: AnyConnection, sites: Iterable[str | None]) -> dict[str | None, Place]:
    """Return the present place of each site."""
    rows = await conn.fetch(_Q["sites"], sorted({site for site in sites if site is not None}))
    return {None: Place(None)} | {row["site"]: Place(row["site"], row["zone"], row["hours"]) for row in rows}


async def of_day(conn: AnyConnection, day: object, devices: list[int]) -> dict[int, Place]:
    """Return the place that each of these devices has on a day that was made before."""
    rows = await conn.fetch(_Q["places_of_day"], day, devices)
    return {row["device_no"]: _place(row) for row in rows}


async def numbers(conn: Connection, places: Iterable[Place]) -> Mapping[Place, int]:
    """Return the numbers under which device_days refers to these places; add those that are new."""
    distinct = list(dict.fromkeys(places))
    columns = list(zip(*((p.site, p.zone, p.hours) for p in distinct), strict=True))
    await conn.execute(_Q["add_places"], *columns)
    return {_place(row): row["place_no"] for row in await conn.fetch(_Q["place_numbers"], *columns)}


def _place(row: Any) -> Place:
    return Place(row["site"], row["zone"], row["hours"])
