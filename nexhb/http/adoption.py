"""A token that is unknown here may be NexMDM's: its device is told to come again while that is found out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nexhb.http import body
from nexhb.http.client import address_of
from nexhb.legacy.adopt import Standing

if TYPE_CHECKING:
    from nexhb.http.parts import Parts

# A device_id takes 100 characters, and JSON six bytes for one at the most.
_CLAIM = re.compile(rb'"device_id"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.){1,600}")')
_decode = msgspec.json.Decoder(str).decode


async def standing_of(request: web.Request, parts: Parts, token: str, token_sha256: bytes) -> Standing:
    """Whose this token is, as far as it is known. For a token whose turn may come, reads the start of the body for the
    device_id that it claims: only a hint of which hash to try first. Raises DatabaseUnavailable, and what reading a
    body raises."""
    standing = await parts.adoption.standing(token, token_sha256)
    if standing is not Standing.OPEN:
        return standing
    server = parts.settings.server
    # Nobody has shown a key here: without the address's allowance nothing is read, and never more than a heartbeat.
    if parts.adoption.admits(token_sha256, address_of(request, server.trusted_proxies)):
        start = await body.read_start(request, most=server.body_max_bytes, timeout_s=server.body_timeout_seconds)
        parts.adoption.ask(token, token_sha256, claimed_in(start))
    return standing


def claimed_in(start: bytes) -> str | None:
    """The first device_id in the start of a body. Nothing is parsed: the bytes are searched once."""
    found = _CLAIM.search(start)
    try:
        return _decode(found[1]) if found else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
