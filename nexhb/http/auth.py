"""Keys: the admin's, compared in constant time, and the devices' tokens."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING

from aiohttp import web

from nexhb import metrics
from nexhb.devices import Device, hash_token
from nexhb.errors import DatabaseUnavailable
from nexhb.http import adoption
from nexhb.http.client import address_of
from nexhb.http.connections import Guarded
from nexhb.http.problem import Problem
from nexhb.legacy.adopt import Standing

if TYPE_CHECKING:
    from nexhb.http.parts import Parts

DEVICE: web.RequestKey[Device] = web.RequestKey("device", Device)  # whose token the request carries
_BEARER = "bearer "
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="nexhb"'}


def bearer(request: web.Request) -> str:
    """The token of `Authorization: Bearer …`, or ''."""
    header = request.headers.get("Authorization", "")
    return header[7:].strip() if header[:7].lower() == _BEARER else ""


class AdminKey:
    """The admin key, held as its hash."""

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    def fits(self, given: str) -> bool:
        """Whether it is the key. Takes as long for any text."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self._digest) and bool(given)


def check_admin(request: web.Request, parts: Parts) -> None:
    """Raise a Problem unless the request carries the admin key, as `x-admin` or as a bearer token."""
    if not parts.admin.fits(request.headers.get("x-admin") or bearer(request)):
        raise wrong_key(request, parts, "admin", "The admin key is missing or wrong.")
    _proven(request)


def is_admin(request: web.Request, parts: Parts) -> bool:
    """Whether the request carries the admin key, where none is needed. A wrong one counts as anywhere, and says nothing
    once there were too many."""
    given = request.headers.get("x-admin") or bearer(request)
    address = address_of(request, parts.settings.server.trusted_proxies)
    if not given or parts.failures.is_spent(address, time.monotonic()):
        return False
    if parts.admin.fits(given):
        return True
    parts.failures.take(address, time.monotonic())
    return False


async def device_of(request: web.Request, parts: Parts) -> Device:
    """Whose token it is. Raises a Problem: 401 only where the store was read and does not know it, 410 for a revoked
    device, 503 where the store could not be read or is an older copy, 429 for an address that guesses."""
    token = bearer(request)
    if not token:
        raise wrong_key(request, parts, "device", "A device token is required: Authorization: Bearer …")
    token_hash = hash_token(token)
    device = parts.devices.known(token_hash)
    if device is None:
        hold_off_guessing(request, parts)
        life = parts.lives.number
        try:
            device = await parts.devices.find(token_hash)
            if device is None:
                device = await _of_nexmdm(request, parts, token, token_hash)
            parts.lives.unless_changed(life)
        except DatabaseUnavailable as error:
            raise parts.unavailable(error) from error
    if device is None and parts.lives.older:
        raise _perhaps_lost(request, parts)
    if device is None:
        raise wrong_key(request, parts, "device", "This device token is not known.")
    request[DEVICE] = device
    if device.revoked:
        metrics.unauthorized.labels(kind="revoked").inc()
        raise Problem(410, "This device was revoked.")
    _proven(request)
    return device


def hold_off_guessing(request: web.Request, parts: Parts) -> None:
    """Raise a 429 Problem for an address with too many wrong keys, before the database is asked about another.

    Keys that are known do not come here: behind one address there may be a whole shop. And 429 is not 401: a device
    whose token is right, and which this daemon has not heard of yet, must not erase it."""
    if parts.failures.is_spent(address_of(request, parts.settings.server.trusted_proxies), time.monotonic()):
        raise _too_many(parts)


def wrong_key(request: web.Request, parts: Parts, kind: str, detail: str) -> Problem:
    """The answer to a missing or wrong key, counted: 401, or 429 once there were too many from this address."""
    metrics.unauthorized.labels(kind=kind).inc()
    address = address_of(request, parts.settings.server.trusted_proxies)
    if parts.failures.take(address, time.monotonic()):
        return _too_many(parts)
    return Problem(401, detail, headers=_CHALLENGE)


async def _of_nexmdm(request: web.Request, parts: Parts, token: str, token_hash: bytes) -> Device | None:
    """The device that was taken over from NexMDM with this token; None where nobody knows it. Raises a 503 Problem
    while that is open, DatabaseUnavailable."""
    standing = await adoption.standing_of(request, parts, token, token_hash)
    if standing is Standing.ADOPTED:
        parts.devices.forget_miss(token_hash)
        return await parts.devices.find(token_hash)
    if standing is not Standing.NOBODYS:
        raise _not_known_yet(request, parts)
    return None


def _not_known_yet(request: web.Request, parts: Parts) -> Problem:
    """The answer while a token is being looked for among NexMDM's. Counted like a wrong one: each costs a look-up and
    perhaps a hash, and 429 harms a device no more than 503."""
    parts.failures.take(address_of(request, parts.settings.server.trusted_proxies), time.monotonic())
    return Problem(503, "It is being found out whose token this is.", headers={"Retry-After": "5"})


def _perhaps_lost(request: web.Request, parts: Parts) -> Problem:
    """The answer to an unknown token while the database is an older copy: its device may have been added, or its token
    changed, since the copy was made. Counted as above."""
    metrics.unauthorized.labels(kind="lost").inc()
    parts.failures.take(address_of(request, parts.settings.server.trusted_proxies), time.monotonic())
    return parts.come_back(f"This device token is not known. {parts.lives.older}")


def _too_many(parts: Parts) -> Problem:
    metrics.rate_limited.labels(kind="address").inc()
    return Problem(429, "Too many calls with a wrong key.", headers={"Retry-After": str(parts.intake.retry_after_s())})


def _proven(request: web.Request) -> None:
    protocol = request.protocol
    if isinstance(protocol, Guarded):
        protocol.prove()
