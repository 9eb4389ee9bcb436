"""One HTTP/1.1 client connection with one request at a time, and a parser for small responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

_MAX_RESPONSE_BYTES: Final = 65_536


class Head(NamedTuple):
    """The parts of a response's head that are used."""

    status: int
    length: int
    close: bool
    retry_after_s: float


class Response(NamedTuple):
    """A response, or the reason why there is none (`failure`, with status 0)."""

    status: int
    retry_after_s: float = 0.0
    deduplicated: bool = False
    body: bytes = b""
    failure: str = ""


@lru_cache(maxsize=512)
def parse_head(raw: bytes) -> Head | None:
    """Parse a response's head (without the blank line); return None if the response cannot be read. Cached, since most
    heads of one second have the same bytes."""
    status_line, *lines = raw.split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    pairs = (line.partition(b":") for line in lines)
    fields = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
    length, retry_after = fields.get(b"content-length", b""), fields.get(b"retry-after", b"")
    if version != b"HTTP/1.1" or not rest[:3].isdigit() or not length.isdigit() or int(length) > _MAX_RESPONSE_BYTES:
        return None
    close = fields.get(b"connection") == b"close"
    return Head(int(rest[:3]), int(length), close, float(retry_after) if retry_after.isdigit() else 0.0)


class Connection(asyncio.Protocol):
    """An HTTP/1.1 client connection. `on_lost` is called once, when the connection is closed, after the callback of a
    pending request."""

    __slots__ = ("_on_lost", "_reason", "_rest", "_transport", "asked_s", "closing", "gone", "reply", "send_no")

    def __init__(self, on_lost: Callable[[Connection], None]) -> None:
        self._on_lost = on_lost
        # called with the response to the pending request; None if no request is pending
        self.reply: Callable[[Connection, Response], None] | None = None
        self._reason = "closed"
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        # the number of the pending request, and the time when it was written (monotonic)
        self.send_no = -1
        self.asked_s = 0.0
        self.closing = self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = transport  # type: ignore[assignment]  # a TCP transport is a Transport

    def ask(self, send_no: int, request: bytes, reply: Callable[[Connection, Response], None]) -> None:
        """Write a request; `reply` is called with the response or the failure."""
        self.send_no, self.asked_s, self.reply = send_no, time.monotonic(), reply
        if self.gone:
            self._finish(Response(0, failure=self._reason))
        else:
            self._transport.write(request)  # type: ignore[union-attr]  # connection_made came first

    async def request(self, request: bytes) -> Response:
        """Write a request and return the response."""
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.ask(-1, request, lambda _, response: None if answered.done() else answered.set_result(response))
        return await answered

    def drop(self, reason: str) -> None:
        """Cut the connection; a pending request fails with this reason."""
        self.closing = True
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail a pending request and report the loss."""
        self.closing = self.gone = True
        if exc is not None and self._reason == "closed":
            self._reason = "reset"
        self._finish(Response(0, failure=self._reason))
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes of a response that have arrived; keep them until the response is complete."""
        data = self._rest + data if self._rest else data
        end = data.find(b"\r\n\r\n")
        head = parse_head(data[:end]) if end >= 0 else None
        if (end >= 0 and head is None) or not b"HTTP/1.".startswith(data[:7]) or len(data) > 2 * _MAX_RESPONSE_BYTES:
            self.drop("garbage")
            return
        stop = end + 4 + (head.length if head else 0)
        if head is None or len(data) < stop:
            self._rest = data
            return
        self._rest = b""
        if head.close or len(data) > stop:
            self.closing = True
            self._transport.close()  # type: ignore[union-attr]  # data came, so the transport is there
        deduplicated = b'"deduplicated":true' in data or b'"deduplicated": true' in data
        self._finish(Response(head.status, head.retry_after_s, deduplicated, data[end + 4 : stop]))

    def _finish(self, response: Response) -> None:
        reply, self.reply = self.reply, None
        if reply is not None:
            reply(self, response)
