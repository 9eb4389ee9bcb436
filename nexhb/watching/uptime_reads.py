"""Reads of uptimes: device_days, and beside it the days that have no rows yet, which are computed on the way.

These are today, and yesterday until the nightly run has made it. Every other day without rows counts as missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

from nexhb.errors import UnknownDevice, UnknownSite
from nexhb.partitions import midnight
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection
from nexhb.reading.reads import Reads
from nexhb.texts import quoted
from nexhb.watching import device_days, months
from nexhb.watching.device_days import DAY, DayTable, UptimeRules
from nexhb.watching.uptime import DayParts, share

_Q = sql.queries("uptime_reads")

MAX_PAGE = 500
MAX_COMPUTED = 500  # devices of which one read computes a day: 1.4 s for half a day at 60 s (decision 0013)
CHUNK_DEVICES = 100  # in one statement, so that none comes near database.read_timeout_seconds
PARTS = ("closed", "ours", "heard", "replayed", "off", "unknown", "unity")
HISTORY = "device_heartbeats"  # the table of a day that is not over, or whose own table may be missing
NO_SITE = ""  # in scopes and keys: devices without a site

Row = dict[str, Any]


@dataclass(frozen=True)
class UptimeQuery:
    """Which uptimes to read: the days start ≤ day < end. `sites` is the scope, and concerns the site that a device had
    on each day; the tag is one that the device has now. None stands for all."""

    start: date
    end: date
    now: datetime
    sites: Sequence[str] | None = None
    tag: str | None = None
    device_id: str | None = None


class UptimePage(NamedTuple):
    """Rows; the `after` of the next page, None on the last; and how many days of devices were not computed, because
    there are more than MAX_COMPUTED."""

    rows: list[Row]
    next: str | None
    left_out: int


class _Total:
    """The sum over days of devices. Parts are in tenths of a minute."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0)
        self.days = self.days_missing = self.flaps = self.reboots = self.left_out = 0
        self.battery_least: int | None = None

    def add_record(self, record: Any) -> None:
        """Add the sums of a query."""
        self._add(record, record["days"])

    def add_day(self, parts: DayParts) -> None:
        """Add a day that was computed."""
        self._add(parts._asdict(), 1)

    def _add(self, sums: Any, days: int) -> None:
        for part in PARTS:
            self.parts[part] += sums[part]
        self.days += days
        self.flaps += sums["flaps"]
        self.reboots += sums["reboots"]
        known = [each for each in (self.battery_least, sums["battery_least"]) if each is not None]
        self.battery_least = min(known, default=None)

    @property
    def is_empty(self) -> bool:
        """Whether no device existed, as far as is known."""
        return not (self.days or self.days_missing or self.left_out)

    def shown(self) -> Row:
        """Return the sums as operators see them."""
        whole = sum(self.parts[part] for part in PARTS if part != "unity")
        part_up = share(self.parts["heard"], self.parts["replayed"], whole, self.parts["closed"], self.parts["ours"])
        return {
            "share": None if part_up is None else round(part_up, 6),
            "days": self.days,
            "days_missing": self.days_missing,
            **{f"{part}_minutes": tenths / 10 for part, tenths in self.parts.items()},
            "battery_least": self.battery_least,
            "flaps": self.flaps,
            "reboots": self.reboots,
        }


@dataclass(frozen=True)
class _Days:
    """The days of a range."""

    start: date
    end: date  # exclusive; of the days that are over
    complete: list[date]
    incomplete: list[date]  # days that are over, and whose rows are not read: there are none, or not all
    computed: list[date]  # the last of the incomplete days, and today
    missing: list[date]  # the other incomplete days

    @classmethod
    async def read(cls, conn: AnyConnection, query: UptimeQuery) -> _Days:
        today = query.now.date()
        end = min(query.end, today)
        complete = [row["day"] for row in await conn.fetch(_Q["made"], query.start, end)]
        over = (query.start + DAY * n for n in range((end - query.start).days))
        incomplete = sorted(set(over).difference(complete))
        computed = [day for day in (*incomplete[-1:], today) if today - DAY <= day < query.end]
        missing = [day for day in incomplete if day not in computed]
        return cls(query.start, end, complete, incomplete, computed, missing)

    def by_month(self) -> Iterator[tuple[date, date, list[date]]]:
        """Yield the days that are over as parts of months: from, to (exclusive), and the incomplete days in it. Each
        part has a statement of its own: none takes longer because the range is longer."""
        start = self.start
        while start < self.end:
            end = min(months.after(start), self.end)
            yield start, end, [day for day in self.incomplete if start <= day < end]
            start = end


class UptimeReads:
    """The reads, on the connections of the other reads. Each raises UnknownSite if no site of the scope exists, and
    UnknownDevice."""

    def __init__(self, reads: Reads, rules: UptimeRules) -> None:
        self._acquired = reads.acquired
        self._rules = rules

    async def by_device(self, query: UptimeQuery, limit: int, after: str | None) -> UptimePage:
        """Return a page of devices, in the order of their ids."""
        async with self._begun(query) as read:
            return await read.by_device(limit, after or "")

    async def by_site(self, query: UptimeQuery, limit: int, after: str | None) -> UptimePage:
        """Return a page of sites, in the order of their ids. The devices that have no site come last."""
        async with self._begun(query) as read:
            return await read.by_site(limit, after)

    async def fleet(self, query: UptimeQuery) -> UptimePage:
        """Return one row for all devices of the scope."""
        async with self._begun(query) as read:
            return await read.fleet()

    @asynccontextmanager
    async def _begun(self, query: UptimeQuery) -> AsyncIterator[_Read]:
        async with self._acquired("uptime") as conn:
            if query.sites is not None and not await conn.fetchval(_Q["has_site"], query.sites):
                raise UnknownSite(f"{', '.join(map(quoted, query.sites))}.")
            only = None if query.tag is None else await conn.fetchval(_Q["tagged"], query.tag)
            if query.device_id is not None:
                number = await conn.fetchval(_Q["device_no"], query.device_id)
                if number is None:
                    raise UnknownDevice(f"{quoted(query.device_id)}.")
                only = [number] if only is None or number in only else []
            # Which days are complete is read first: a day that is completed meanwhile does not count twice.
            yield _Read(conn, query, self._rules, await _Days.read(conn, query), only)


@dataclass(frozen=True)
class _Read:
    """One read, on one connection."""

    conn: AnyConnection
    query: UptimeQuery
    rules: UptimeRules
    days: _Days
    only: list[int] | None  # the device_no of the devices to which the read is limited

    async def by_device(self, limit: int, after: str) -> UptimePage:
        scope, listed = self.query.sites, self.only
        at = None if scope is None else await self.conn.fetchval(_Q["places"], scope)
        if scope is not None:
            listed = await self._in_scope(scope, at)
        start = midnight(self.query.start)
        found = await self.conn.fetch(_Q["device_page"], after, limit + 1, listed, start, self.days.missing)
        page = found[:limit]
        totals = {row["device_no"]: _Total() for row in page}
        for record in await self.conn.fetch(_Q["by_device"], self.days.complete, list(totals), at):
            totals[record["device_no"]].add_record(record)
        present = [row for row in page if scope is None or (row["site"] or NO_SITE) in scope]
        for row in present:
            totals[row["device_no"]].days_missing = row["days_missing"]
        for day in self.days.computed:
            for number, (_, parts) in (await self._computed(day, present)).items():
                totals[number].add_day(parts)
        rows = [
            {**{name: row[name] for name in ("device_id", "name", "site")}, **totals[row["device_no"]].shown()}
            for row in page
            if not totals[row["device_no"]].is_empty
        ]
        return UptimePage(rows, page[-1]["device_id"] if len(found) > limit else None, 0)

    async def _in_scope(self, scope: Sequence[str], at: list[int] | None) -> list[int]:
        """Return the devices that are in the scope now, or were on one of the days."""
        numbers = set(await self.conn.fetchval(_Q["devices_of"], scope))
        for start, end, _ in self.days.by_month() if at else ():
            numbers.update(await self.conn.fetchval(_Q["devices_at"], start, end, at))
        return sorted(numbers if self.only is None else numbers.intersection(self.only))

    async def by_site(self, limit: int, after: str | None) -> UptimePage:
        scope = self.query.sites
        found = [row["site"] for row in await self.conn.fetch(_Q["site_page"], after, limit + 1, scope)]
        has_more = len(found) > limit
        sites = found[:limit] + [NO_SITE] * (scope is None and not has_more)
        totals = {site: _Total() for site in sites}
        await self._add_all(sites, totals.__getitem__)
        rows = [
            {"site": site or None, **total.shown(), "left_out": total.left_out}
            for site, total in totals.items()
            if not total.is_empty
        ]
        left_out = sum(total.left_out for total in totals.values())
        return UptimePage(rows, sites[-1] if has_more else None, left_out)

    async def fleet(self) -> UptimePage:
        total = _Total()
        await self._add_all(self.query.sites, lambda _site: total)
        return UptimePage([{**total.shown(), "left_out": total.left_out}], None, total.left_out)

    async def _add_all(self, scope: Sequence[str] | None, total_of: Callable[[str], _Total]) -> None:
        """Add all days of the scope's devices to the totals of their sites."""
        at = None if scope is None else await self.conn.fetchval(_Q["places"], scope)
        for start, end, incomplete in self.days.by_month():
            for record in await self.conn.fetch(_Q["by_place"], start, end, incomplete, at, self.only):
                total_of(record["site"]).add_record(record)
        if self.days.missing:
            for record in await self.conn.fetch(_Q["missing_by_site"], scope, self.only, self.days.missing):
                total_of(record["site"]).days_missing += record["days_missing"]
        for day in self.days.computed:
            await self._add_computed(day, scope, total_of)

    async def _add_computed(self, day: date, scope: Sequence[str] | None, total_of: Callable[[str], _Total]) -> None:
        start = midnight(day)
        rows = await self.conn.fetch(_Q["existing"], scope, self.only, start, MAX_COMPUTED + 1)
        devices = rows[:MAX_COMPUTED]
        for site, parts in (await self._computed(day, devices)).values():
            total_of(site).add_day(parts)
        if len(rows) > MAX_COMPUTED:
            computed = Counter(row["site"] or NO_SITE for row in devices)
            for record in await self.conn.fetch(_Q["existing_by_site"], scope, self.only, start):
                total_of(record["site"]).left_out += record["devices"] - computed[record["site"]]

    async def _computed(self, day: date, rows: Iterable[Any]) -> dict[int, tuple[str, DayParts]]:
        """Compute a day of these devices; return their sites and parts by device_no. Devices that did not exist on the
        day are left out."""
        devices = await device_days.placed(self.conn, day, rows)
        found: dict[int, tuple[str, DayParts]] = {}
        for first in range(0, len(devices), CHUNK_DEVICES):
            chunk, source = devices[first : first + CHUNK_DEVICES], DayTable(day, HISTORY)
            parts = await device_days.compute(self.conn, source, chunk, self.rules, self.query.now)
            found |= {d.device_no: (d.place.site or NO_SITE, parts[d.device_no]) for d in chunk if d.device_no in parts}
        return found
