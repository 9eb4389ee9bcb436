"""The 200 responses to heartbeats, sent as bytes that are built once a second.

aiohttp builds, filters and serialises the headers of each response: 8 µs of the 60 µs that a heartbeat may cost. The
responses with one body differ only in their Date. A connection that is about to close gets a `web.Response`.
"""

from __future__ import annotations

import time
from email.utils import formatdate

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

from nexhb.http.transport.problem import SERVER


class PrebuiltResponse(web.StreamResponse):
    """A 200 with a constant JSON body. It has no state of a request, so one object serves all requests."""

    def __init__(self, body: bytes) -> None:
        super().__init__(status=200)
        self._body_bytes = body
        self._second = 0
        self._bytes = b""
        self.content_type = "application/json"
        self.content_length = len(body)

    def to(self, request: web.Request) -> web.StreamResponse:
        """Return this response, or a `web.Response` if the connection closes afterwards."""
        if request.keep_alive and request.transport is not None:
            return self
        return web.Response(body=self._body_bytes, content_type="application/json", headers=SERVER)

    @property
    def keep_alive(self) -> bool:
        """Always true: `to` returns a `web.Response` for a connection that closes."""
        return True

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole response."""
        if request.transport is not None:
            request.transport.write(self.as_bytes())
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` has written everything."""

    def as_bytes(self) -> bytes:
        """Return the whole response, with the current Date."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._bytes = (
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(self._body_bytes)}\r\n"
                f"Date: {formatdate(second, usegmt=True)}\r\nServer: nexhb\r\n\r\n"
            ).encode() + self._body_bytes
        return self._bytes
