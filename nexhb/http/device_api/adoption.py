"""Look up an unknown token among NexMDM's; meanwhile the device receives 503 and retries."""

from __future__ import annotations

import re

import msgspec
from aiohttp import web

from nexhb.http.device_api.context import DeviceApi
from nexhb.http.transport import body
from nexhb.http.transport.client import address_of
from nexhb.nexmdm.adoption import TokenStatus

# A device_id has at most 100 characters, each of at most six bytes in JSON.
_CLAIM = re.compile(rb'"device_id"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.){1,600}")')
_decode = msgspec.json.Decoder(str).decode


async def status_of(request: web.Request, api: DeviceApi, token: str, token_sha256: bytes) -> TokenStatus:
    """Return whether NexMDM knows this token, or PENDING if the look-up has not ended. If bcrypt hashes have to be
    tried, the device_id at the start of the body tells which hash to try first; it proves nothing. Raise
    DatabaseUnavailable, and the errors of reading a body."""
    status = await api.adoption.status(token, token_sha256)
    if status is not TokenStatus.PENDING:
        return status
    server = api.settings.server
    # The sender is not authenticated: the body is read only within the rate limit of its address, and only up to the
    # size of a heartbeat.
    if api.adoption.may_enqueue(token_sha256, address_of(request, server.trusted_proxies)):
        start = await body.read_start(request, max_bytes=server.body_max_bytes, timeout_s=server.body_timeout_seconds)
        api.adoption.enqueue(token, token_sha256, claimed_in(start))
    return status


def claimed_in(start: bytes) -> str | None:
    """Return the first device_id in the start of a body. Nothing is parsed: the bytes are searched once."""
    match = _CLAIM.search(start)
    try:
        return _decode(match[1]) if match else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
