"""A token that is unknown here may be one of which NexMDM left only a bcrypt hash: its device is told to come again,
and meanwhile it is found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nexhb import wire
from nexhb.http import body
from nexhb.http.client import address_of
from nexhb.http.problem import Problem
from nexhb.legacy.adopt import Standing

if TYPE_CHECKING:
    from nexhb.http.parts import Parts


READ_MOST = 2**21  # bytes; an agent's whole queue is 0.6 MB


class _Claim(msgspec.Struct):
    device_id: str | None = None


_decode = msgspec.json.Decoder(_Claim).decode


async def is_open(request: web.Request, parts: Parts, token: str, token_sha256: bytes) -> bool:
    """Whether it is not known yet whose this token is. Reads the body, bounded, for the device_id that it claims: only
    a hint of which hash to try first. Raises DatabaseUnavailable, and what reading a body raises."""
    standing = await parts.adoption.standing(token, token_sha256)
    if standing is not Standing.OPEN:
        return standing is Standing.ADOPTED
    server = parts.settings.server
    raw = await _read(request, server.body_timeout_seconds)
    parts.adoption.ask(token, token_sha256, _claimed(raw), address_of(request, server.trusted_proxies))
    return True


async def _read(request: web.Request, timeout_s: float) -> bytes:
    """The body; nothing where it is larger than any agent's: it is only for a hint."""
    try:
        return await body.read(request, most=READ_MOST, timeout_s=timeout_s)
    except Problem as problem:
        if problem.status == 413:
            return b""
        raise


def _claimed(raw: bytes) -> str | None:
    try:
        return _decode(wire.split(raw, most=500)[0] if raw.lstrip().startswith(b"[") else raw).device_id
    except (msgspec.MsgspecError, wire.Refused, UnicodeDecodeError, RecursionError, IndexError):
        return _claimed(raw.partition(b"\n")[0]) if b"\n" in raw else None  # NDJSON
