"""One HTTP/1.1 client connection: one request at a time, and a parser for small answers."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

IDLE: Final = -1
_ANSWER_BYTES: Final = 65_536


class Head(NamedTuple):
    """What matters of an answer's head; `fault` says why the answer cannot be read."""

    status: int
    length: int
    close: bool
    retry_after_s: float
    fault: str | None


def _fault(reason: str) -> Head:
    return Head(0, 0, True, 0.0, reason)


@lru_cache(maxsize=512)
def parse_head(raw: bytes) -> Head:
    """Read an answer's head (without the blank line). Cached: within one second most are the same bytes."""
    status_line, *lines = raw.split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
        return _fault("garbage")
    status = int(rest[:3])
    fields = {
        name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines)
    }
    length = fields.get(b"content-length", b"")
    connection = fields.get(b"connection", b"")
    retry_after = fields.get(b"retry-after", b"")
    if b"transfer-encoding" in fields:
        return _fault("chunked")
    if status in (204, 304) or status < 200:
        length = b"0"
    if not length.isdigit():
        return _fault("no_length")
    if int(length) > _ANSWER_BYTES:
        return _fault("too_long")
    close = connection == b"close" or (version == b"HTTP/1.0" and connection != b"keep-alive")
    return Head(status, int(length), close, float(retry_after) if retry_after.isdigit() else 0.0, None)


class Owner(Protocol):
    """Who a connection reports to."""

    def connected(self, conn: Connection) -> None:
        """It may be written to."""

    def answered(self, conn: Connection, send_no: int, head: Head, deduplicated: bool) -> None:
        """The answer to `send_no` came; the connection is free, unless `conn.closing`."""

    def lost(self, conn: Connection, send_no: int, reason: str) -> None:
        """It is gone; `send_no` is the request whose answer was awaited, or -1."""


class Connection(asyncio.Protocol):
    """An HTTP/1.1 client connection with one request at a time and a parser for small answers."""

    __slots__ = ("_rest", "_transport", "body", "closing", "lane", "owner", "reason", "send_no")

    def __init__(self, owner: Owner, lane: int) -> None:
        """Belong to the owner's lane."""
        self.owner = owner
        self.lane = lane
        self.send_no = IDLE
        self.closing = False
        self.reason = "closed"
        # of the last answer
        self.body = b""
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # a TCP transport is a Transport
        self.owner.connected(self)

    def send(self, send_no: int, request: bytes) -> None:
        """Write a request, whose answer will carry `send_no`."""
        self.send_no = send_no
        self._transport.write(request)  # type: ignore[union-attr]  # only a connected one is sent on

    def drop(self, reason: str) -> None:
        """Cut the connection; `lost` follows with this reason."""
        self.closing = True
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self.closing = True
        send_no, self.send_no = self.send_no, IDLE
        if exc is not None and self.reason == "closed":
            self.reason = "reset"
        self.owner.lost(self, send_no, self.reason)

    def data_received(self, data: bytes) -> None:
        """Take in a piece of an answer."""
        if self._rest:
            data = self._rest + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._keep(data, None if b"HTTP/1.".startswith(data[:7]) else "garbage")
            return
        head = parse_head(data[:end])
        if head.fault is not None or self.send_no == IDLE:
            self.drop(head.fault or "unasked")
            return
        stop = end + 4 + head.length
        if head.status < 200:
            self._rest = b""
            self.data_received(data[stop:])
            return
        if len(data) < stop:
            self._keep(data, None)
            return
        self._rest = b""
        send_no, self.send_no = self.send_no, IDLE
        if head.close or len(data) > stop:
            self.closing = True
            self._transport.close()  # type: ignore[union-attr]  # data came, so it is connected
        self.body = data[end + 4 : stop]
        deduplicated = b'"deduplicated":true' in data or b'"deduplicated": true' in data
        self.owner.answered(self, send_no, head, deduplicated)

    def _keep(self, data: bytes, fault: str | None) -> None:
        """Wait for the rest of an answer, within a bound."""
        if len(data) > 2 * _ANSWER_BYTES:
            fault = "too_long"
        if fault is None:
            self._rest = data
        else:
            self.drop(fault)
