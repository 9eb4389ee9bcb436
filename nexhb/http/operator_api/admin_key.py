"""Check the admin key that operators' requests carry."""

from __future__ import annotations

import hashlib
import hmac

from aiohttp import web

from nexhb.http.credentials import WrongKeys, bearer, mark_authenticated


class AdminKey:
    """The admin key, kept as a hash."""

    def __init__(self, key: str, wrong_keys: WrongKeys) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()
        self._wrong_keys = wrong_keys

    def check(self, request: web.Request) -> None:
        """Raise a Problem unless the request carries the admin key, as `x-admin` or as a bearer token."""
        if not self._matches(_key_in(request)):
            raise self._wrong_keys.problem(request, "admin", "The admin key is missing or wrong.")
        mark_authenticated(request)

    def is_in(self, request: web.Request) -> bool:
        """Return whether the request carries the admin key, for a call that does not require it. A wrong key is
        counted, and after too many from this address the key is not checked at all."""
        key = _key_in(request)
        if not key or self._wrong_keys.too_many_from(request):
            return False
        if self._matches(key):
            return True
        self._wrong_keys.count(request)
        return False

    def _matches(self, key: str) -> bool:
        """Return whether `key` is the admin key, in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self._digest) and bool(key)


def _key_in(request: web.Request) -> str:
    return request.headers.get("x-admin") or bearer(request)


def key_id(request: web.Request) -> str:
    """Return a hash of the key that the request carries, to count by."""
    return hashlib.sha256(_key_in(request).encode("utf-8", "surrogateescape")).hexdigest()
