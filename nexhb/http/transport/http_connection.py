"""A connection after its TLS handshake: aiohttp's, with time limits, and with an interceptor for heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol

import aiohttp
import uvloop
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from nexhb import log, metrics, supported
from nexhb.http.transport.connections import Connections
from nexhb.http.transport.head import INCOMPLETE, Request, is_bodiless
from nexhb.http.transport.problem import Problem

supported.check("aiohttp", aiohttp.__version__)
supported.check("uvloop", uvloop.__version__)  # type: ignore[attr-defined]

_log = log.get("http")

READ_BUFFER = 2**16  # bytes of a body that may wait for the handler; reading pauses at twice as many bytes
MIN_READ_BYTES = 4096  # a client that reads less of a waiting response between two sweeps counts as not reading
SLOW_S = 0.02  # pause after each read (256 kB at most) of a body that is discarded: 2 MB take 0.2 s

HOLD_S = 0.25  # how long an incomplete heartbeat is held before aiohttp, with its own limits, receives it


class Interceptor(Protocol):
    """Serves some requests before aiohttp receives them."""

    def read(self, data: bytes) -> Request | None:
        """Return the request if `data` is exactly one request to serve, INCOMPLETE if it may become one, or None."""

    def serve(self, connection: HttpConnection, request: Request) -> bool:
        """Accept the request and call connection.send_response later, or return False without any effect."""


class HttpConnection(RequestHandler):
    """aiohttp's connection, with time limits, and with an interceptor that serves some requests by itself."""

    __slots__ = (
        "_connections", "_hold_timer", "_interceptor", "_is_at_boundary", "_is_discarding", "_pause", "_pending_bytes",
        "_read_timer", "_response_due", "_response_sent", "_stuck_since", "_tcp", "_unsent", "waiting_since",
    )  # fmt: skip

    def __init__(self, connections: Connections, server: web.Server, interceptor: Interceptor, **options: Any) -> None:
        super().__init__(server, **options)
        self._connections = connections
        self._interceptor = interceptor
        self._is_at_boundary = True  # aiohttp's parser is certainly between two requests
        self._response_due = False  # the interceptor has accepted a request and not yet responded
        self._pending_bytes = b""  # bytes that arrived before the response, or the start of a request
        self._hold_timer: asyncio.TimerHandle | None = None  # ends the wait for the rest of an incomplete request
        self._response_sent: asyncio.Future[None] | None = None  # awaited by `shutdown`
        self._tcp: asyncio.Transport | None = None  # kept until the close, unlike aiohttp's own reference
        self.waiting_since = 0.0  # s; since when the connection waits for its first head or the rest of a head; else 0
        self._stuck_since = 0.0  # s; since when the client reads no response, or the connection is closing; else 0
        self._unsent = 0  # bytes in the write buffer at the last sweep
        self._pause: asyncio.Future[None] | None = None
        self._is_discarding = False  # the rest of a body is read slowly and discarded
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and start the time limit of its first head."""
        super().connection_made(transport)
        self._tcp = self.transport
        self.waiting_since = self._loop.time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Remove the connection, and drop what it holds."""
        self._tcp = None
        self._connections.closed(self)
        self._take_pending()
        self._end_pause()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass a complete request that the interceptor can serve to it, and everything else to aiohttp."""
        if self._is_discarding and data and self._tcp is not None:
            self._tcp.pause_reading()
            self._resume_later()
        if self._response_due:
            self._hold_back(data)
            return
        if self._is_at_boundary and data:  # without data: aiohttp calls this to continue with its buffer
            if self._pending_bytes:
                data = self._pending_bytes + data
            request = self._interceptor.read(data)
            if request is INCOMPLETE and self._is_free:
                self._await_rest(data)
                return
            if self._pending_bytes:
                self._take_pending()
            if request and request is not INCOMPLETE:
                if self._is_free and not self._is_closing and self._interceptor.serve(self, request):
                    self._response_due = True
                    return
            elif not is_bodiless(data):
                self._is_at_boundary = False
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """Pass the bytes on to aiohttp."""
        if self._is_closing and self._request_in_progress and self.transport is not None:
            self._finish_body(data)
        else:
            super().data_received(data)
        if not self._awaits_head:
            self.waiting_since = 0.0  # the head is complete; the body has a timeout of its own
        elif not self.waiting_since:
            self.waiting_since = self._loop.time()

    def _finish_body(self, data: bytes) -> None:
        """Let a handler receive its body during the shutdown: aiohttp waits for its handlers, but discards the bodies
        that they wait for."""
        closing = self._close, self._force_close
        self._close = self._force_close = False
        try:
            super().data_received(data)
        finally:
            self._close, self._force_close = closing

    def _hold_back(self, data: bytes) -> None:
        """Keep bytes that arrive before the response is sent, and pause reading above READ_BUFFER."""
        self._pending_bytes += data
        if len(self._pending_bytes) > READ_BUFFER and self._tcp is not None:
            self._tcp.pause_reading()

    def _await_rest(self, data: bytes) -> None:
        self._pending_bytes = data
        if self._hold_timer is None:
            self._hold_timer = self._loop.call_later(HOLD_S, self._stop_waiting)
        if not self.waiting_since:
            self.waiting_since = self._loop.time()

    def _stop_waiting(self) -> None:
        """Pass an incomplete heartbeat on to aiohttp, with its time limits for heads and bodies."""
        self._is_at_boundary = False
        self._pass_on(self._take_pending())

    def _take_pending(self) -> bytes:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
        data, self._pending_bytes = self._pending_bytes, b""
        return data

    def send_response(self, response: bytes) -> None:
        """Send the response to the request that the interceptor accepted."""
        self._response_due = False
        tcp = self._tcp
        if tcp is not None and not tcp.is_closing():
            if self._is_closing:
                tcp.write(response.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                tcp.close()
            else:
                tcp.write(response)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._response_sent is not None and not self._response_sent.done():
            self._response_sent.set_result(None)
        if self._pending_bytes:
            self._loop.call_soon(self._process_pending)

    def _process_pending(self) -> None:
        if self._response_due or self._tcp is None or not self._pending_bytes:
            return
        if len(self._pending_bytes) > READ_BUFFER:
            self._tcp.resume_reading()
        self.data_received(self._take_pending())

    def _process_keepalive(self) -> None:
        """Postpone the keep-alive timeout while a response is due: aiohttp considers the connection idle."""
        if self._response_due:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    @property
    def _is_closing(self) -> bool:
        """Whether aiohttp accepts no further request on this connection."""
        return self._close or self._force_close

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Wait up to `timeout` seconds until the response that is due has been sent, then shut down as aiohttp does."""
        if self._response_due:
            self._response_sent = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._response_sent
        await super().shutdown(timeout)

    @property
    def _awaits_head(self) -> bool:
        """Whether aiohttp waits for the head of a request. Bytes of a discarded body do not start a head."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def _is_free(self) -> bool:
        """Whether no request is in progress. That is also true before aiohttp's task has started: the first request
        of a device may arrive before the start of the task, and with TLS even before connection_made."""
        if self._waiter is not None:
            return not self._waiter.done()
        return self._tcp is not None and self._request_count == 0

    def overdue(self, now: float, within_s: float) -> str:
        """Return the reason why the connection has to be cut at `now` ("slow_head" or "not_read"), else ''."""
        if self.waiting_since and self._awaits_head and now - self.waiting_since > within_s:
            return "slow_head"
        if self._tcp is None:
            return ""
        unsent = self._tcp.get_write_buffer_size()
        if unsent <= self._unsent - MIN_READ_BYTES or not (unsent or self._tcp.is_closing()):
            self._stuck_since = 0.0
        elif not self._stuck_since:
            self._stuck_since = now
        self._unsent = unsent
        return "not_read" if self._stuck_since and now - self._stuck_since > within_s else ""

    async def pause(self, wait_s: float) -> None:
        """Delay the response by `wait_s`, or until the client closes the connection."""
        if self._tcp is None:
            return
        self._pause = self._loop.create_future()
        timer = self._loop.call_later(wait_s, self._end_pause)
        try:
            await self._pause
        finally:
            timer.cancel()
            self._pause = None

    def _end_pause(self) -> None:
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def mark_authenticated(self) -> None:
        """Record that the current request has a valid key."""
        self.waiting_since = 0.0
        self._connections.authenticated(self)

    @property
    def is_authenticated(self) -> bool:
        """Whether a request on this connection had a valid key."""
        return self._connections.is_authenticated(self)

    def slow_down(self) -> None:
        """Read the rest of the body slowly: it is discarded, because its sender is unknown and the response was sent.
        At full speed, four such connections with bodies of 2 MB take most of the event loop's time."""
        self._is_discarding = True

    def _resume_transport_reading(self) -> None:
        """Resume reading after aiohttp has discarded what arrived; with a delay if the sender is unknown."""
        if self._is_discarding:
            self._resume_later()
        else:
            super()._resume_transport_reading()

    def _resume_later(self) -> None:
        if self._read_timer is None:
            self._read_timer = self._loop.call_later(SLOW_S, self._resume_reading)

    def _resume_reading(self) -> None:
        self._read_timer = None
        if self._tcp is not None and not self._tcp.is_closing():
            self._tcp.resume_reading()

    def cut(self, reason: str) -> None:
        """Close the connection at once."""
        metrics.connections_cut.labels(reason=reason).inc()
        self._connections.closed(self)
        tcp = self._tcp
        self.force_close()
        if tcp is not None:
            tcp.abort()  # close() would wait until the client has read everything

    def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Replace aiohttp's own error responses by problem details (CONNECT and `OPTIONS *` match no route)."""
        if isinstance(resp, web.HTTPException):
            resp = Problem(resp.status, "This path does not exist.", close=True).response()
        return super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Respond to invalid HTTP, or to an unhandled exception, with problem details. The response does not repeat the
        request, which may contain a key."""
        if status < 500:
            _log.warning("http.bad_request_line", error=type(exc).__name__)
            return Problem(status, "This is not a valid HTTP request.", close=True).response()
        self.log_exception("Unhandled exception", exc_info=exc)
        return Problem(status, "An unexpected error occurred; see the log.", close=True).response()
