"""Changes of devices. Each change is one transaction and is announced to every daemon by NOTIFY."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from nexhb.devices.tokens import hash_token, new_token
from nexhb.errors import BadInput, DeviceExists, UnknownDevice
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, lasting
from nexhb.texts import quoted, unfit

_Q = sql.queries("devices")

MAX_TAGS = 20
MAX_TAG_CHARS = 50
TAG_SEPARATORS = re.compile(r"[\s,;]+")  # what separates the tags of a device in a file
RESERVED = ("offline", "unity-down")  # not allowed as ids: GET /v1/devices/offline returns a list, not a device


async def add(conn: Connection, device_id: str, alias: str | None) -> str:
    """Add a device and return its token, which cannot be shown again. Raise DeviceExists or BadInput."""
    check_device_id(device_id)
    if alias is not None:
        check_text(alias, "alias", 200)
    token = new_token()
    async with lasting(conn):
        device_no = await conn.fetchval(_Q["add_device"], device_id, alias)
        if device_no is None:
            raise DeviceExists(
                f"{quoted(device_id)} is in use.", hint="`nexhb devices rotate` gives a known device a new token."
            )
        await conn.execute(_Q["add_token"], hash_token(token), device_no)
    return token


async def rotate(conn: Connection, device_id: str) -> str:
    """Give a known device a new token and return it. Its old tokens stop working, and a revoked device is readmitted.

    Raise UnknownDevice if there is no such device.
    """
    token = new_token()
    async with lasting(conn):
        device_no = await device_no_of(conn, device_id)
        await conn.execute(_Q["mark_rotated"], device_no)
        await conn.execute(_Q["drop_tokens"], device_no)
        await conn.execute(_Q["drop_nexmdm_hashes"], device_no)
        await conn.execute(_Q["end_enrolment"], device_no)
        await conn.execute(_Q["part_twins"], device_no)
        await conn.execute(_Q["add_token"], hash_token(token), device_no)
        await conn.execute(_Q["readmit_device"], device_no)
    return token


async def revoke(conn: Connection, device_id: str, now: datetime) -> None:
    """Revoke a device: its heartbeats receive 410, and the device no longer counts as part of the fleet.

    Raise UnknownDevice if there is no such device.
    """
    async with lasting(conn):
        device_no = await device_no_of(conn, device_id)
        since = await conn.fetchval(_Q["revoke_device"], device_no, now)
        await conn.execute(_Q["end_enrolment"], device_no)
        await conn.execute(_Q["revoke_tokens"], device_no, since)


class Readmitted(NamedTuple):
    """The result of a readmission."""

    was_revoked: bool
    tokens: int  # number of tokens of the device that are valid now


async def readmit(conn: Connection, device_id: str) -> Readmitted:
    """Undo the revocation of a device and of the tokens revoked with it. The device continues with the token that it
    holds, so nobody has to visit it.

    A device that is not revoked remains unchanged. Raise UnknownDevice if there is no such device.
    """
    async with lasting(conn):
        device_no = await device_no_of(conn, device_id)
        await conn.execute(_Q["readmit_tokens"], device_no)
        was_revoked = await conn.fetchval(_Q["readmit_device"], device_no) is not None
        return Readmitted(was_revoked, await conn.fetchval(_Q["count_tokens"], device_no))


async def change(conn: Connection, device_id: str, values: Mapping[str, Any]) -> None:
    """Set what operators say of a device: those of `site`, `tags` and `name` that `values` has. A site or name of None
    takes it away.

    Raise BadInput that names the field, also if there is no such site, or UnknownDevice.
    """
    values = dict(values)
    for field, max_chars in (("site", 100), ("name", 200)):
        if values.get(field) is not None:
            check_text(values[field], field, max_chars)
    if "tags" in values:
        values["tags"] = check_tags(values["tags"])
    try:
        async with lasting(conn):
            device_no = await device_no_of(conn, device_id)
            arguments = [values.get(field) for field in ("site", "tags", "name")]
            await conn.execute(_Q["change_device"], device_no, list(values), *arguments)
    except asyncpg.ForeignKeyViolationError:
        raise unknown_site(values["site"]) from None


async def page(conn: Connection, after: str, limit: int) -> list[asyncpg.Record]:
    """Return up to `limit` devices in the order of their ids, starting after the id `after`."""
    rows: list[asyncpg.Record] = await conn.fetch(_Q["list_devices"], after, limit)
    return rows


async def device_no_of(conn: Connection, device_id: str) -> int:
    """Return the number of a device. Raise UnknownDevice if there is no such device."""
    device_no = await conn.fetchval(_Q["device_no"], device_id)
    if device_no is None:
        raise UnknownDevice(f"{quoted(device_id)}.", hint="`nexhb devices list` shows all devices.")
    return int(device_no)


def unknown_site(site: str) -> BadInput:
    """Return the error for a field `site` that names a site that does not exist."""
    return BadInput(f"site {quoted(site)} not found.", hint="`nexhb sites list` shows all sites.", field="site")


def check_device_id(device_id: str) -> None:
    """Raise BadInput if the text cannot be the id of a device."""
    check_text(device_id, "device_id", 100)
    if device_id in RESERVED:
        raise BadInput(f"device_id {quoted(device_id)} is reserved: it is the name of a list.", field="device_id")


def check_text(value: str, name: str, max_chars: int) -> None:
    """Raise BadInput unless `value` has 1 to `max_chars` printable characters. The message calls the value `name`."""
    unprintable = unfit(value)
    if not 1 <= len(value) <= max_chars or unprintable:
        reason = f"; {unprintable} is not printable" if unprintable else ""
        raise BadInput(f"{name} takes 1 to {max_chars} printable characters{reason}.", field=name)


def check_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags sorted, each once. Raise BadInput if there are too many, or one is not valid."""
    sorted_tags = sorted(set(tags))
    if len(sorted_tags) > MAX_TAGS:
        raise BadInput(f"tags takes at most {MAX_TAGS} tags.", field="tags")
    for tag in sorted_tags:
        if not 1 <= len(tag) <= MAX_TAG_CHARS or unfit(tag) or TAG_SEPARATORS.search(tag):
            raise BadInput(
                f"tags: {quoted(tag[:100])} is not a tag; a tag has 1 to {MAX_TAG_CHARS} printable characters, without "
                "blanks, commas and semicolons.", field="tags",
            )  # fmt: skip
    return sorted_tags
