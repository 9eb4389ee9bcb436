"""What aiohttp leaves open: how long a handshake, a request's head and the reading of an answer may take, and how many
connections there may be.

Without it a client that sends half a head, or never reads what it asked for, holds its connection for ever, and ten
thousand idle ones take every descriptor that healthy devices need.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, cast

import aiohttp
import uvloop
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from nexhb import log, metrics, supported
from nexhb.http.head import INCOMPLETE, Request, is_bodiless
from nexhb.http.problem import Problem

supported.check("aiohttp", aiohttp.__version__)
supported.check("uvloop", uvloop.__version__)  # type: ignore[attr-defined]

_log = log.get("http")

READ_BUFFER = 2**16  # bytes of a body that a handler has not asked for; twice as much is held, then the line is paused
READS_AT_LEAST = 4096  # bytes from one look to the next, of answers that wait: whoever drips does not read
SLOW_S = 0.02  # between two reads (256 kB at most) of a body that nobody wants: 2 MB take 0.2 s

HOLD_S = 0.25  # how long the start of a heartbeat waits for its rest, before aiohttp and its bounds see to it


class Direct(Protocol):
    """A way around aiohttp, for requests that it understands."""

    def read(self, data: bytes) -> Request | None:
        """The one request that `data` is; INCOMPLETE where it may become one; None where it is anything else."""

    def serve(self, connection: Guarded, request: Request) -> bool:
        """Take it, and call connection.answer later. False: it is aiohttp's, and nothing happened."""


class _Line(Protocol):
    """A connection, from its first moment on."""

    def late(self, now: float, within_s: float) -> str:
        """Why it is to be cut at `now`; '' while it is in time."""

    def cut(self, reason: str) -> None:
        """Close it now."""


class Connections:
    """All connections of one daemon. Only the event loop's thread touches it."""

    def __init__(self, *, most: int, head_timeout_s: float) -> None:
        self.most = most
        metrics.connections_limit.set(most)
        self.head_timeout_s = head_timeout_s
        self._open: set[_Line] = set()
        # Those that never showed a valid key, the oldest first: the ones to go when there are too many.
        self._unproven: dict[_Line, None] = {}

    def factory(
        self, server: web.Server, direct: Direct, tls: ssl.SSLContext | None, **options: Any
    ) -> Callable[[], asyncio.Protocol]:
        """What asyncio calls for each connection. `options` as aiohttp's RequestHandler takes them."""
        loop = asyncio.get_running_loop()

        def guarded() -> Guarded:
            return Guarded(self, server, direct, loop=loop, read_bufsize=READ_BUFFER, **options)

        return guarded if tls is None else lambda: Handshake(self, tls, guarded)

    def opened(self, connection: _Line) -> None:
        """One more; over the bound, the oldest that never showed a key goes, or the new one itself."""
        self._open.add(connection)
        self._unproven[connection] = None
        if len(self._open) > self.most:
            next(iter(self._unproven)).cut("too_many")

    def closed(self, connection: _Line) -> None:
        """One less."""
        self._open.discard(connection)
        self._unproven.pop(connection, None)

    def proven(self, connection: _Line) -> None:
        """It showed a valid key."""
        self._unproven.pop(connection, None)

    def is_proven(self, connection: _Line) -> bool:
        """Whether it did."""
        return connection not in self._unproven

    def sweep(self, now: float) -> None:
        """Cut those that do not get on in time; called now and then, by the loop's clock."""
        metrics.connections_open.set(len(self._open))
        late = [(one, reason) for one in self._open if (reason := one.late(now, self.head_timeout_s))]
        for one, reason in late:
            one.cut(reason)

    def cut_handshakes(self) -> None:
        """On the way out: aiohttp does not know of these."""
        for one in [one for one in self._open if isinstance(one, Handshake)]:
            one.cut("stopping")


class Handshake(asyncio.Protocol):
    """A connection that is to be TLS. asyncio's own handshake would be counted by nobody, and may take a minute."""

    def __init__(self, connections: Connections, tls: ssl.SSLContext, then: Callable[[], Guarded]) -> None:
        self._connections = connections
        self._tls = tls
        self._then = then
        self._began = 0.0
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._began = asyncio.get_running_loop().time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._connections.closed(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. The first bytes: what follows is for start_tls, which knows nothing of these."""
        self._transport.pause_reading()
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._shake(loop))
        # One turn later start_tls has called for the start of TLS and of reading, and so these come between the two.
        loop.call_soon(loop.call_soon, self._pass_on, data)

    def _pass_on(self, data: bytes) -> None:
        tls = self._transport.get_protocol()
        if isinstance(tls, Handshake) or self._transport.is_closing():
            return  # cut meanwhile
        tls = cast(asyncio.BufferedProtocol, tls)
        memoryview(tls.get_buffer(len(data)))[: len(data)] = data
        tls.buffer_updated(len(data))

    async def _shake(self, loop: asyncio.AbstractEventLoop) -> None:
        guarded = self._then()
        try:
            within_s = self._connections.head_timeout_s
            secure = await loop.start_tls(
                self._transport, guarded, self._tls, server_side=True, ssl_handshake_timeout=within_s
            )
        except (OSError, asyncio.CancelledError):  # no TLS, an old one, gone, late, cut
            metrics.connections_cut.labels(reason="handshake").inc()
            self._transport.abort()
            secure = None
        self._connections.closed(self)
        # A request may be in by now, which waits in aiohttp's queue; or the client is gone already.
        if secure is not None and not secure.is_closing():
            guarded.connection_made(secure)

    def late(self, now: float, within_s: float) -> str:
        """See _Line."""
        return "slow_handshake" if now - self._began > within_s else ""

    def cut(self, reason: str) -> None:
        """See _Line."""
        metrics.connections_cut.labels(reason=reason).inc()
        self._connections.closed(self)
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()


class Guarded(RequestHandler):
    """aiohttp's connection, watched."""

    __slots__ = (
        "_answered", "_clean", "_connections", "_direct", "_due", "_held", "_hold", "_line", "_pausing", "_reads_on",
        "_slow", "_stuck_since", "_unsent", "waiting_since",
    )  # fmt: skip

    def __init__(self, connections: Connections, server: web.Server, direct: Direct, **options: Any) -> None:
        super().__init__(server, **options)
        self._connections = connections
        self._direct = direct
        self._clean = True  # aiohttp's parser stands between two requests, for certain
        self._due = False  # an answer that `direct` owes
        self._held = b""  # what came while one was due, or the start of a request
        self._hold: asyncio.TimerHandle | None = None  # ends the wait for the rest of it
        self._answered: asyncio.Future[None] | None = None  # awaited by the shutdown
        self._line: asyncio.Transport | None = None  # aiohttp forgets it when it closes, whether or not it is closed
        self.waiting_since = 0.0  # s, since when a head is awaited that has begun, or the first one; 0 while none is
        self._stuck_since = 0.0  # s, since when its answers are not read, or it does not close; 0 while all is well
        self._unsent = 0  # bytes, as last seen
        self._pausing: asyncio.Future[None] | None = None
        self._slow = False  # what comes is the rest of a body that nobody wants
        self._reads_on: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._line = self.transport
        self.waiting_since = self._loop.time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._line = None
        self._connections.closed(self)
        self._unhold()
        self._go_on()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._slow and data and self._line is not None:
            self._line.pause_reading()
            self._read_later()
        if self._due:
            self._keep(data)
            return
        if self._clean and data:  # aiohttp calls with nothing to go on with what it has
            if self._held:
                data = self._held + data
            request = self._direct.read(data)
            if request is INCOMPLETE and self._is_free:
                self._await_rest(data)
                return
            if self._held:
                self._unhold()
            if request and request is not INCOMPLETE:
                if self._is_free and not self._closes and self._direct.serve(self, request):
                    self._due = True
                    return
            elif not is_bodiless(data):
                self._clean = False
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """To aiohttp."""
        if self._closes and self._request_in_progress and self.transport is not None:
            self._finish_body(data)
        else:
            super().data_received(data)
        if not self._idle:
            self.waiting_since = 0.0  # a whole head is there; its body has a timeout of its own
        elif not self.waiting_since:
            self.waiting_since = self._loop.time()

    def _finish_body(self, data: bytes) -> None:
        """On the way out aiohttp finishes its handlers, but throws away the bodies that they wait for."""
        closing = self._close, self._force_close
        self._close = self._force_close = False
        try:
            super().data_received(data)
        finally:
            self._close, self._force_close = closing

    def _keep(self, data: bytes) -> None:
        """What comes before the answer waits for it, within bounds."""
        self._held += data
        if len(self._held) > READ_BUFFER and self._line is not None:
            self._line.pause_reading()

    def _await_rest(self, data: bytes) -> None:
        self._held = data
        if self._hold is None:
            self._hold = self._loop.call_later(HOLD_S, self._give_up_rest)
        if not self.waiting_since:
            self.waiting_since = self._loop.time()

    def _give_up_rest(self) -> None:
        """It takes its time: aiohttp may wait for it, under the bounds for heads and bodies."""
        self._clean = False
        self._pass_on(self._unhold())

    def _unhold(self) -> bytes:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        data, self._held = self._held, b""
        return data

    def answer(self, said: bytes) -> None:
        """The answer that `direct` owed."""
        self._due = False
        line = self._line
        if line is not None and not line.is_closing():
            if self._closes:
                line.write(said.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                line.close()
            else:
                line.write(said)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)
        if self._held:
            self._loop.call_soon(self._go_on_reading)

    def _go_on_reading(self) -> None:
        if self._due or self._line is None or not self._held:
            return
        if len(self._held) > READ_BUFFER:
            self._line.resume_reading()
        self.data_received(self._unhold())

    def _process_keepalive(self) -> None:
        """aiohttp's, at the end of the keep-alive: to it a connection with an answer due is an idle one."""
        if self._due:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    @property
    def _closes(self) -> bool:
        """No further request is taken; aiohttp's own flags."""
        return self._close or self._force_close

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """As aiohttp's: what is under way is answered first."""
        if self._due:
            self._answered = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._answered
        await super().shutdown(timeout)

    @property
    def _idle(self) -> bool:
        """Whether a head is awaited. What comes of a body that nobody reads any more is not the start of one."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def _is_free(self) -> bool:
        """Whether no request is under way; nor is one before aiohttp's task has begun, which a device that connects
        and sends at once does not wait for. With TLS such a one comes before the connection is made."""
        if self._waiter is not None:
            return not self._waiter.done()
        return self._line is not None and self._request_count == 0

    def late(self, now: float, within_s: float) -> str:
        """See _Line."""
        if self.waiting_since and self._idle and now - self.waiting_since > within_s:
            return "slow_head"
        if self._line is None:
            return ""
        unsent = self._line.get_write_buffer_size()
        if unsent <= self._unsent - READS_AT_LEAST or not (unsent or self._line.is_closing()):
            self._stuck_since = 0.0
        elif not self._stuck_since:
            self._stuck_since = now
        self._unsent = unsent
        return "not_read" if self._stuck_since and now - self._stuck_since > within_s else ""

    async def pause(self, wait_s: float) -> None:
        """Hold the answer back for so long, or until nobody is there any more to hear it."""
        if self._line is None:
            return
        self._pausing = self._loop.create_future()
        timer = self._loop.call_later(wait_s, self._go_on)
        try:
            await self._pausing
        finally:
            timer.cancel()
            self._pausing = None

    def _go_on(self) -> None:
        if self._pausing is not None and not self._pausing.done():
            self._pausing.set_result(None)

    def prove(self) -> None:
        """Its request, which is being answered, carried a valid key."""
        self.waiting_since = 0.0
        self._connections.proven(self)

    @property
    def is_proven(self) -> bool:
        """Whether a request on this connection carried a valid key."""
        return self._connections.is_proven(self)

    def slow_down(self) -> None:
        """Read what is left slowly: it is the body of somebody unknown, who is answered already, and thrown away. As
        fast as it comes, four such connections with bodies of 2 MB take most of the event loop's time."""
        self._slow = True

    def _resume_transport_reading(self) -> None:
        """aiohttp's, once what came is thrown away."""
        if self._slow:
            self._read_later()
        else:
            super()._resume_transport_reading()

    def _read_later(self) -> None:
        if self._reads_on is None:
            self._reads_on = self._loop.call_later(SLOW_S, self._read_on)

    def _read_on(self) -> None:
        self._reads_on = None
        if self._line is not None and not self._line.is_closing():
            self._line.resume_reading()

    def cut(self, reason: str) -> None:
        """See _Line."""
        metrics.connections_cut.labels(reason=reason).inc()
        self._connections.closed(self)
        line = self._line
        self.force_close()
        if line is not None:
            line.abort()  # close() waits for what is not sent yet, and whoever does not read gets the last word

    def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """What aiohttp answers by itself (CONNECT and `OPTIONS *` have no path for a route) is a problem as well."""
        if isinstance(resp, web.HTTPException):
            resp = Problem(resp.status, "There is nothing here.", close=True).response()
        return super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is no HTTP, answered as every other error is. Nothing of it is repeated: it may hold a key."""
        if status < 500:
            _log.warning("http.bad_request_line", error=type(exc).__name__)
            return Problem(status, "This is not a valid HTTP request.", close=True).response()
        self.log_exception("Unhandled exception", exc_info=exc)
        return Problem(status, "An unexpected error; it is in the log.", close=True).response()
