"""Show silences where the silenced thing is shown: `silenced` is the end of the silence, True if it has none, and None
if nothing is silenced."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from nexhb.devices.sites import KnownSite
from nexhb.http.operator_api.context import OperatorApi
from nexhb.messages import silences


async def mark_devices(api: OperatorApi, rows: Sequence[Any], now: datetime) -> None:
    """Set `silenced` of row objects of devices."""
    if not rows:
        return
    async with api.reads.acquired("silences") as conn:
        in_force = await silences.in_force(conn, now)
        tags = await silences.tags_of(conn, [row.device_id for row in rows], in_force)
    if in_force:
        for row in rows:
            row.silenced = in_force.of(row.device_id, row.site, tags.get(row.device_id, ()))


async def shown_sites(api: OperatorApi, sites: Sequence[KnownSite], now: datetime) -> list[dict[str, Any]]:
    """Return sites as responses show them."""
    async with api.reads.acquired("silences") as conn:
        in_force = await silences.in_force(conn, now)
    return [site.shown(now) | {"silenced": in_force.of(site=site.site)} for site in sites]


async def mark_incidents(api: OperatorApi, rows: Sequence[dict[str, Any]], now: datetime) -> None:
    """Set `silenced` of open incidents: by the fleet, by their site, or because each of their devices is silenced."""
    opened = [row["incident_id"] for row in rows if row["resolved_at"] is None and row["scope"] != "ours"]
    async with api.reads.acquired("silences") as conn:
        in_force = await silences.in_force(conn, now)
        whole = await silences.whole(conn, opened, in_force)
    for row in rows:
        row["silenced"] = None
        if row["incident_id"] in opened:
            device_id = row["named"][0] if row["scope"] == "device" and row["named"] else None
            row["silenced"] = in_force.of(device_id, row["site"]) or (row["incident_id"] in whole or None)
