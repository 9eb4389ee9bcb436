"""Count the devices by state and the open incidents, for metrics that are the same in every daemon."""

from __future__ import annotations

from collections import Counter

from nexhb import metrics
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("watching")

MAX_SITES = 1_000  # a metric with more series would burden Prometheus
SCOPES = ("device", "site", "fleet", "ours")
STATES = ("online", "offline", "unity_down", "battery_low")


async def update_metrics(conn: Connection) -> None:
    """Set the gauges of the fleet, of the sites and of the open incidents."""
    by_site: Counter[tuple[str | None, str]] = Counter()
    for row in await conn.fetch(_Q["state_counts"]):
        site = row["site"]
        by_site[site, row["presence"]] += row["devices"]
        by_site[site, "unity_down"] += row["unity_down"]
        by_site[site, "battery_low"] += row["battery_low"]
    sites = {site for site, _ in by_site}
    for state in STATES:
        metrics.fleet_devices.labels(state=state).set(sum(by_site[site, state] for site in sites))
    metrics.site_devices.clear()  # a site without devices has no series
    named = sites - {None}
    if len(named) <= MAX_SITES:
        for site in named:
            for state in STATES:
                metrics.site_devices.labels(site=site, state=state).set(by_site[site, state])
    await _update_incidents(conn)


async def _update_incidents(conn: Connection) -> None:
    rows = await conn.fetch(_Q["incident_counts"])
    opened = Counter[str]()
    for row in rows:
        opened[row["scope"]] += row["incidents"]
    for scope in SCOPES:
        metrics.incidents_open.labels(scope=scope).set(opened[scope])
    of_sites = [row for row in rows if row["site"] is not None]
    metrics.site_incidents_open.clear()  # a site that is no longer down has no series
    if len(of_sites) <= MAX_SITES:
        for row in of_sites:
            metrics.site_incidents_open.labels(site=row["site"], kind=row["kind"]).set(1)
