"""The two answers that every heartbeat gets, written as bytes made once a second.

aiohttp builds, sorts out and serialises headers for each response, 8 µs of the 60 that a heartbeat may cost; these
never differ but for the Date. A connection that is to be closed takes the ordinary way.
"""

from __future__ import annotations

import time
from email.utils import formatdate

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

from nexhb.http.problem import SERVER


class QuickAnswer(web.StreamResponse):
    """A 200 with a JSON body that never changes. Stateless, so that one serves every request."""

    def __init__(self, body: bytes) -> None:
        super().__init__(status=200)
        self._body_bytes = body
        self._second = 0
        self._bytes = b""
        self.content_type = "application/json"
        self.content_length = len(body)

    def to(self, request: web.Request) -> web.StreamResponse:
        """This answer, or an ordinary one where the connection closes after it."""
        if request.keep_alive and request.transport is not None:
            return self
        return web.Response(body=self._body_bytes, content_type="application/json", headers=SERVER)

    @property
    def keep_alive(self) -> bool:
        """Always: see `to`."""
        return True

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write all of it."""
        if request.transport is not None:
            request.transport.write(self.as_bytes())
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """All of it is written."""

    def as_bytes(self) -> bytes:
        """All of it, with the Date of this second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._bytes = (
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(self._body_bytes)}\r\n"
                f"Date: {formatdate(second, usegmt=True)}\r\nServer: nexhb\r\n\r\n"
            ).encode() + self._body_bytes
        return self._bytes
