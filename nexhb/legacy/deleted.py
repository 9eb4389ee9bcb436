"""Devices that an earlier import took and NexMDM has deleted since. NexMDM removes such a device's row at once, so that
nothing there says that its token is revoked: here it goes on until somebody revokes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from nexhb import devices, sql
from nexhb.db import Connection
from nexhb.legacy.devices import Devices
from nexhb.legacy.source import Source

_Q = sql.queries("legacy")

AT_MOST, SHARE = 10, 10  # so many are revoked at once, or one in so many of those that earlier imports took


@dataclass
class Deleted:
    """What an import found of them, and did."""

    alive: list[str] = field(default_factory=list)  # here, and deleted there
    own_token: list[str] = field(default_factory=list)  # of these: nexhb gave them a token since
    revocable: dict[str, int] = field(default_factory=dict, compare=False)  # device_id → device_no, of the others
    revoked: list[str] = field(default_factory=list)  # by this import
    not_revoked_because: str = ""


async def find(source: Source, conn: Connection, taken: Devices) -> Deleted:
    """Name them. `taken`: what the source has now."""
    rows = await conn.fetch(_Q["deleted"], source.name, list(taken.numbers.values()))
    return Deleted(
        [row["device_id"] for row in rows],
        [row["device_id"] for row in rows if row["own_token"]],
        {row["device_id"]: row["device_no"] for row in rows if not row["own_token"] and not row["done_before"]},
    )


async def revoke(source: Source, conn: Connection, taken: Devices, at_most: int | None, now: datetime) -> Deleted:
    """Revoke them, unless the source may be the wrong one. A device that nexhb gave a token since is left to the
    operator, and so is one that was revoked this way before and admitted again."""
    found = await find(source, conn, taken)
    wanted = dict(found.revocable)
    for device_id in await source.among(list(wanted)):  # enrolled again meanwhile
        del wanted[device_id]
    if not wanted:
        return found
    given = await conn.fetchval(_Q["given"], source.name)
    found.not_revoked_because = why_not(
        len(wanted), taken.known, given, taken.older, is_standby=source.is_standby, at_most=at_most
    )
    if found.not_revoked_because:
        return found
    for device_id, device_no in wanted.items():
        async with conn.transaction():
            await devices.revoke(conn, device_id, now)
            await conn.execute(_Q["revoked_as_deleted"], source.name, device_no, now)
        found.revoked.append(device_id)
    found.alive = [device_id for device_id in found.alive if device_id not in wanted]
    return found


def why_not(deleted: int, remaining: int, given: int, older: int, *, is_standby: bool, at_most: int | None) -> str:
    """Why so many devices are not to be revoked; empty where nothing speaks against it. Of the `given` ones that
    earlier imports took the source still has `remaining`, `older` of them as they were before the last import."""
    limit = max(AT_MOST, given // SHARE) if at_most is None else at_most
    if remaining <= 0:
        return "the source has none of the devices that earlier imports took from it"
    if is_standby:
        return "the source is a standby, which may lag: give the primary"
    if older:
        return f"{older:,} devices were seen later by an earlier import: the source is an older copy, or lags"
    if deleted > limit:
        return f"{deleted:,} are more than {limit:,} at once; --revoke-at-most {deleted} allows it"
    return ""
