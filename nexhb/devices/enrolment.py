"""Enrolment keys, and the devices that register themselves with an enrolment key."""

from __future__ import annotations

from datetime import datetime
from uuid import uuid4

import asyncpg

from nexhb.devices.registry import add, check_text, device_no_of, unknown_site
from nexhb.devices.tokens import hash_token, new_token
from nexhb.errors import EnrolmentRefused
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, lasting

_Q = sql.queries("devices")


async def issue_enrolment_key(
    conn: Connection, *, note: str | None, uses: int, expires_at: datetime, site: str | None = None
) -> str:
    """Create and return a key with which devices may register themselves, `uses` times, until `expires_at`. They
    belong to the site. The key cannot be shown again. Raise BadInput."""
    for text, name, max_chars in ((note, "note", 200), (site, "site", 100)):
        if text is not None:
            check_text(text, name, max_chars)
    key = new_token()
    try:
        async with lasting(conn):
            await conn.execute(_Q["add_enrolment_key"], hash_token(key), note, uses, expires_at, site)
    except asyncpg.ForeignKeyViolationError:
        raise unknown_site(str(site)) from None
    return key


async def enrol(conn: Connection, key: str, device_id: str | None, alias: str | None, now: datetime) -> tuple[str, str]:
    """Add a device and use `key` once; return the device's device_id (random unless given) and its token. Raise
    EnrolmentRefused, DeviceExists or BadInput, without using the key.

    A device that registered with this key before and has sent nothing since did not receive the response: its token is
    replaced by a new token, without using the key again. If no device_id is given, that device is recognised by its
    alias, but only once the key is used up: while uses are left, a second kiosk may have the same alias.
    """
    key_hash = hash_token(key)
    async with lasting(conn):
        uses_left = await conn.fetchval(_Q["hold_enrolment_key"], key_hash, now)
        if uses_left is None:
            raise EnrolmentRefused("The key is unknown, used up or expired.")
        if device := await _unacknowledged_enrolment(conn, key_hash, device_id, alias, uses_left):
            return device["device_id"], await _enrol_again(conn, device["device_no"], alias)
        if not uses_left:
            raise EnrolmentRefused("The key is unknown, used up or expired.")
        device_id = device_id or str(uuid4())
        token = await add(conn, device_id, alias)
        device_no = await device_no_of(conn, device_id)
        await conn.execute(_Q["use_enrolment_key"], key_hash)
        await conn.execute(_Q["add_enrolment"], device_no, key_hash, now)
        await conn.execute(_Q["give_site_of_key"], device_no, key_hash)
        return device_id, token


async def _unacknowledged_enrolment(
    conn: Connection, key_hash: bytes, device_id: str | None, alias: str | None, uses_left: int
) -> asyncpg.Record | None:
    """Return the device that registered with this key and has sent nothing since; None unless exactly one matches."""
    if "\0" in f"{device_id}{alias}":
        return None
    if device_id is not None:
        return await conn.fetchrow(_Q["unacknowledged_enrolment"], device_id, key_hash)
    if uses_left or alias is None:
        return None
    devices = await conn.fetch(_Q["unacknowledged_enrolments_as"], alias, key_hash)
    return devices[0] if len(devices) == 1 else None


async def _enrol_again(conn: Connection, device_no: int, alias: str | None) -> str:
    if alias is not None:
        check_text(alias, "alias", 200)
        await conn.execute(_Q["rename"], device_no, alias)
    token = new_token()
    await conn.execute(_Q["drop_tokens"], device_no)
    await conn.execute(_Q["add_token"], hash_token(token), device_no)
    return token
