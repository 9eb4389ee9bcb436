"""Count how many devices a fault affects, of the sites in question and of the fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching.incidents import COMBINED, Affected, Fault
from nexhb.watching.judging import Rules
from nexhb.watching.state import INTERVALS_OVERDUE

_Q = sql.queries("watching")

# In a large fleet a sample shows whether so few devices are overdue that these cannot be over half of it. If they were,
# a sample of the pages of 100,000 devices (35) had less than a quarter once in 1,000 rounds, one of 200,000 never.
LARGE_FLEET = 200_000
CLEARLY_FEW = 0.25

FleetCounts = dict[str, tuple[int, int]]  # kind → devices, affected; counted once in a round

NOTHING = Affected(0, 0, 0, uses_sites=False, by_site={})


async def affected_by(
    conn: Connection, faults: Sequence[Fault], rules: Rules, presence: Presence, counts: FleetCounts
) -> Affected:
    """Return how many devices are affected by faults of this kind. A device that has not been heard for one and a half
    of its intervals counts as silent: when a site's first device crosses its threshold, the others are about to."""
    kind = faults[0].kind
    if kind not in COMBINED:
        return NOTHING
    sites = sorted({fault.site for fault in faults if fault.site is not None})
    by_site = await _by_site(conn, kind, sites, rules, presence)
    uses_sites = bool(sites) or await conn.fetchval(_Q["uses_sites"])
    sites_affected = len(sites) if len(sites) > 1 else len(sites) + await conn.fetchval(_Q["other_sites"], kind, sites)
    if uses_sites and len(sites) < 2 and sites_affected < 2:
        return Affected(0, 0, len(sites), uses_sites=True, by_site=by_site)
    if kind not in counts:
        counts[kind] = await _fleet(conn, kind, rules, presence)
    devices, affected = counts[kind]
    return Affected(devices, affected, sites_affected, uses_sites=uses_sites, by_site=by_site)


async def _by_site(
    conn: Connection, kind: str, sites: Sequence[str], rules: Rules, presence: Presence
) -> Mapping[str, tuple[int, int]]:
    """Return the number of devices of each site, and how many of them are affected. The devices are counted only at
    sites where more than one is affected: nearly every fault of a large fleet is alone at its site."""
    if not sites:
        return {}
    rows = await conn.fetch(_Q["devices_of_sites"], sites)
    site_of = {no: row["site"] for row in rows for no in row["numbers"]}
    find = _overdue if kind == "offline" else _without_unity
    affected = Counter(site_of[no] for no in await find(conn, list(site_of), rules, presence))
    several = {site for site, number in affected.items() if number > 1}
    numbers = [no for no, site in site_of.items() if site in several]
    heard = await conn.fetch(_Q["heard"], _array(numbers)) if numbers else []
    devices = Counter(site_of[row["device_no"]] for row in heard)
    return {site: (devices[site], affected[site]) for site in sites}


async def _without_unity(conn: Connection, numbers: Sequence[int], _: Rules, __: Presence) -> Sequence[int]:
    return [row["device_no"] for row in await conn.fetch(_Q["unity_down_of"], _array(numbers))]


async def _overdue(conn: Connection, numbers: Sequence[int], rules: Rules, presence: Presence) -> Sequence[int]:
    """Return the devices that have not been heard for one and a half of their intervals; an interval that was learned
    counts as at least half of the usual one, so that intervals are read only of devices that may be overdue."""
    shortest = rules.interval / 2
    rows = await conn.fetch(_Q["heard_before"], _array(numbers), presence.now - INTERVALS_OVERDUE * shortest)
    heard_at = {row["device_no"]: row["heard_at"] for row in rows}
    known = await conn.fetch(_Q["intervals"], _array(heard_at)) if heard_at else []
    interval_of = {row["device_no"]: max(shortest, timedelta(seconds=row["interval_s"])) for row in known}
    return [no for no, at in heard_at.items() if _is_overdue(presence, at, interval_of.get(no, rules.interval))]


def _is_overdue(presence: Presence, heard_at: datetime, interval: timedelta) -> bool:
    return presence.silence(heard_at) > INTERVALS_OVERDUE * interval


async def _fleet(conn: Connection, kind: str, rules: Rules, presence: Presence) -> tuple[int, int]:
    """Return the number of devices of the fleet, and how many of them are affected; if these are clearly not over half
    of the fleet, perhaps other numbers of which this is true as well."""
    if kind != "offline":
        row = await conn.fetchrow(_Q["fleet_unity_down"])
        assert row is not None  # noqa: S101 - an aggregate has one row
        return row["devices"], row["affected"]
    silent = presence.silent_for(INTERVALS_OVERDUE * rules.interval)
    condition = silent.before, silent.multirange
    rows = await conn.fetchval(_Q["fleet_rows"])
    if rows >= LARGE_FLEET and await conn.fetchval(_Q["fleet_overdue_sample"], *condition) < CLEARLY_FEW:
        return int(rows), 0
    row = await conn.fetchrow(_Q["fleet_overdue"], *condition)
    assert row is not None  # noqa: S101 - an aggregate has one row
    devices, affected = row["devices"], row["affected"]
    if affected * 2 <= devices:
        return devices, affected
    # Devices with a long interval were counted as if they had the usual one.
    intervals = {
        long["device_no"]: timedelta(seconds=long["interval_s"])
        for long in await conn.fetch(_Q["long_intervals"], rules.interval.total_seconds() * 1.1)
    }
    for heard in await conn.fetch(_Q["heard"], _array(intervals)):
        is_counted = presence.silence(heard["heard_at"]) > INTERVALS_OVERDUE * rules.interval
        if is_counted and not _is_overdue(presence, heard["heard_at"], intervals[heard["device_no"]]):
            affected -= 1
    return devices, affected


def _array(numbers: Iterable[int]) -> str:
    """Return an array as PostgreSQL's text: of thousands of numbers, asyncpg takes 4 µs for each."""
    return "{" + ",".join(map(str, numbers)) + "}"
