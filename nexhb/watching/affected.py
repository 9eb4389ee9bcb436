"""Count how many devices a fault affects, of the sites in question and of the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from nexhb.watching.incidents import COMBINED, Affected, Fault
from nexhb.watching.judging import Rules
from nexhb.watching.state import INTERVALS_OVERDUE

_Q = sql.queries("watching")

NOTHING = Affected(0, 0, 0, uses_sites=False, by_site={})


async def affected_by(conn: Connection, faults: Sequence[Fault], rules: Rules, presence: Presence) -> Affected:
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
    devices, affected = await _fleet(conn, kind, rules, presence)
    return Affected(devices, affected, sites_affected, uses_sites=uses_sites, by_site=by_site)


async def _by_site(
    conn: Connection, kind: str, sites: Sequence[str], rules: Rules, presence: Presence
) -> Mapping[str, tuple[int, int]]:
    if not sites:
        return {}
    devices = {row["device_no"]: row for row in await conn.fetch(_Q["devices_of_sites"], sites)}
    counts = dict.fromkeys(sites, (0, 0))
    for row in await conn.fetch(_Q["heard"], list(devices)):
        device = devices[row["device_no"]]
        if kind == "offline":
            is_affected = _is_overdue(presence, row["heard_at"], device["interval_s"], rules)
        else:
            is_affected = row["unity_running"] is False
        total, affected = counts[device["site"]]
        counts[device["site"]] = (total + 1, affected + is_affected)
    return counts


def _is_overdue(presence: Presence, heard_at: datetime, interval_s: float | None, rules: Rules) -> bool:
    interval = rules.interval if interval_s is None else timedelta(seconds=interval_s)
    return presence.silence(heard_at) > INTERVALS_OVERDUE * interval


async def _fleet(conn: Connection, kind: str, rules: Rules, presence: Presence) -> tuple[int, int]:
    """Return the number of devices of the fleet, and how many of them are affected."""
    if kind != "offline":
        row = await conn.fetchrow(_Q["fleet_unity_down"])
        assert row is not None  # noqa: S101 - an aggregate has one row
        return row["devices"], row["affected"]
    silent = presence.silent_for(INTERVALS_OVERDUE * rules.interval)
    row = await conn.fetchrow(_Q["fleet_overdue"], silent.before, silent.multirange)
    assert row is not None  # noqa: S101 - an aggregate has one row
    devices, affected = row["devices"], row["affected"]
    if affected * 2 <= devices:
        return devices, affected
    # Devices with a long interval were counted as if they had the usual one.
    intervals = {
        long["device_no"]: long["interval_s"]
        for long in await conn.fetch(_Q["long_intervals"], rules.interval.total_seconds() * 1.1)
    }
    for heard in await conn.fetch(_Q["heard"], list(intervals)):
        is_counted = presence.silence(heard["heard_at"]) > INTERVALS_OVERDUE * rules.interval
        if is_counted and not _is_overdue(presence, heard["heard_at"], intervals[heard["device_no"]], rules):
            affected -= 1
    return devices, affected
