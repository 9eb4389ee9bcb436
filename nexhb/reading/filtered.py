"""Lists of devices that are limited or sorted by their last status. Each page is one read of device_last_status."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from nexhb.devices.presence import Presence
from nexhb.postgres import sql
from nexhb.postgres.connections import AnyConnection
from nexhb.reading import filters
from nexhb.reading.queries import UNITY_DOWN_WINDOW, StatusQuery

_Q = sql.queries("reads")

_LAST_SLOT = 2**31 - 1
_NEVER_SEEN_PAGE = 5_000


@dataclass(frozen=True)
class Page:
    """The devices of a page by number, in the order of the list."""

    numbers: list[int]
    keys: list[int]  # by which they are sorted
    total: int | None  # devices on all pages, if they were counted


@asynccontextmanager
async def snapshot(conn: AnyConnection) -> AsyncIterator[None]:
    """Run the block in one snapshot, with plans for its arguments."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        await conn.execute(_Q["plan_each"])
        yield


async def page(conn: AnyConnection, query: StatusQuery, presence: Presence, offline_after: timedelta) -> Page:
    """Return the first `limit` devices after the query's position."""
    among = query.among
    heard_in, slot = _heard_in(query, presence, offline_after)
    numbers = await filters.numbers(conn, among.by_number)
    records = await conn.fetch(
        _Q["filtered"], "inactive" if among.state == "inactive" else "ok", heard_in, slot,
        query.unity_down or among.state == "unity_down", numbers, among.text, among.battery_below, among.clock_wrong,
        among.agent_version, among.unity_pkg_version, among.agent_version_below, among.unity_pkg_version_below,
        query.sort, *query.after, query.limit, query.counted,
    )  # fmt: skip
    total = records[0]["total"] if records else 0
    return Page([record["device_no"] for record in records], [record["key"] for record in records], total)


def _heard_in(query: StatusQuery, presence: Presence, offline_after: timedelta) -> tuple[list[str], int]:
    """Return the times, all of which the last heartbeat must be in, and the last heard_slot of these times."""
    heard_in, slot = [], _LAST_SLOT
    if query.silent_for is not None:
        silent = presence.silent_for(query.silent_for)
        heard_in.append(silent.matched)
        slot = _slot(silent.before.timestamp())
    if query.unity_down or query.among.state == "unity_down":
        heard_in.append(f"{{[{(presence.now - UNITY_DOWN_WINDOW).isoformat()},)}}")
    if query.among.state in ("online", "offline", "unknown"):
        heard_in.append(presence.heard_in(query.among.state, offline_after))
        if query.among.state != "online":
            slot = min(slot, _slot((presence.now - offline_after).timestamp()))
    return heard_in, slot


def _slot(seconds: float) -> int:
    return int(seconds // 300)


async def rows(conn: AnyConnection, statement: str, numbers: list[int]) -> list[Any]:
    """Return the records of a statement for these devices, in the order of the numbers."""
    found = {record["device_no"]: record for record in await conn.fetch(statement, numbers)}
    return [found[number] for number in numbers if number in found]


async def never_seen(conn: AnyConnection, among: tuple[Any, ...], after: str, limit: int) -> list[Any]:
    """Return up to `limit` devices without a last status, in the order of device_id. `among` has the arguments of
    device_page_among but the first two. The devices are not joined with device_last_status, which may be
    distributed."""
    found: list[Any] = []
    while True:
        devices = await conn.fetch(_Q["device_page_among"], after, _NEVER_SEEN_PAGE, *among)
        seen = set(await conn.fetchval(_Q["seen"], [device["device_no"] for device in devices]))
        found += [device for device in devices if device["device_no"] not in seen]
        if len(found) >= limit or len(devices) < _NEVER_SEEN_PAGE:
            return found[:limit]
        after = devices[-1]["device_id"]
