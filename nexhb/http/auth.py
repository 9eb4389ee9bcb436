"""Keys: the admin's, compared in constant time, and the devices' tokens."""

from __future__ import annotations

import hashlib
import hmac

from aiohttp import web

from nexhb import metrics
from nexhb.devices import Device, DeviceStore, hash_token
from nexhb.errors import DatabaseUnavailable
from nexhb.http.problem import Problem

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

    def check(self, request: web.Request) -> None:
        """Raise a 401 Problem unless the request carries the key, as `x-admin` or as a bearer token."""
        given = request.headers.get("x-admin") or bearer(request)
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, self._digest) or not given:
            metrics.unauthorized.labels(kind="admin").inc()
            raise Problem(401, "The admin key is missing or wrong.", headers=_CHALLENGE)


async def device_of(request: web.Request, store: DeviceStore) -> Device:
    """Whose token it is. Raises a Problem: 401 only where the store was read and does not know it, 410 for a revoked
    device, 503 where the store could not be read."""
    token = bearer(request)
    if not token:
        metrics.unauthorized.labels(kind="device").inc()
        raise Problem(401, "A device token is required: Authorization: Bearer …", headers=_CHALLENGE)
    token_hash = hash_token(token)
    device = store.known(token_hash)
    if device is None:
        try:
            device = await store.find(token_hash)
        except DatabaseUnavailable as error:
            raise Problem(503, str(error), headers={"Retry-After": "5"}) from error
    if device is None:
        metrics.unauthorized.labels(kind="device").inc()
        raise Problem(401, "This device token is not known.", headers=_CHALLENGE)
    if device.revoked:
        metrics.unauthorized.labels(kind="revoked").inc()
        raise Problem(410, "This device was revoked.")
    return device
