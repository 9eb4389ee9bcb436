"""The keys that requests carry, and the limit on wrong keys, which both APIs share."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from nexhb import metrics
from nexhb.config import Settings
from nexhb.http.transport.client import address_of
from nexhb.http.transport.http_connection import HttpConnection
from nexhb.http.transport.problem import Problem
from nexhb.rate_limit import RateLimiter

_BEARER = "bearer "
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="nexhb"'}


def bearer(request: web.Request) -> str:
    """Return the token of `Authorization: Bearer …`, or ''."""
    header = request.headers.get("Authorization", "")
    return header[7:].strip() if header[:7].lower() == _BEARER else ""


def mark_authenticated(request: web.Request) -> None:
    """Record on the connection that the request has a valid key: such a connection is not cut to make room."""
    protocol = request.protocol
    if isinstance(protocol, HttpConnection):
        protocol.mark_authenticated()


class WrongKeys:
    """Counts missing and wrong keys by address, and refuses an address that sent too many."""

    def __init__(self, settings: Settings, retry_after_s: Callable[[], int]) -> None:
        per_minute = settings.auth.failures_per_minute
        self._failures = RateLimiter(burst=5 * per_minute, per_second=per_minute / 60)
        self._trusted_proxies = settings.server.trusted_proxies
        self._retry_after_s = retry_after_s

    def count(self, request: web.Request) -> bool:
        """Count a wrong key, and return whether its address may still send another."""
        return self._failures.acquire(self._address_of(request), time.monotonic()).allowed

    def too_many_from(self, request: web.Request) -> bool:
        """Return whether the address of this request sent too many wrong keys."""
        return self._failures.is_exhausted(self._address_of(request), time.monotonic())

    def reject_guessing(self, request: web.Request) -> None:
        """Raise a 429 Problem for an address that sent too many wrong keys, before the database is queried for a key.

        A token in memory is accepted before this check, because a whole shop may share one address. The status is 429
        and not 401: a device must not erase a valid token that this daemon does not know yet."""
        if self.too_many_from(request):
            raise self._too_many()

    def problem(self, request: web.Request, kind: str, detail: str) -> Problem:
        """Count a missing or wrong key, and return the problem: 401, or 429 after too many from this address."""
        metrics.unauthorized.labels(kind=kind).inc()
        return Problem(401, detail, headers=_CHALLENGE) if self.count(request) else self._too_many()

    def _too_many(self) -> Problem:
        metrics.rate_limited.labels(kind="address").inc()
        return Problem(429, "Too many requests with a wrong key.", headers={"Retry-After": str(self._retry_after_s())})

    def _address_of(self, request: web.Request) -> str:
        return address_of(request, self._trusted_proxies)
