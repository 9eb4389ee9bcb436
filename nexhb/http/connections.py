"""What aiohttp leaves open: how long a request's head may take, and how many connections there may be.

Without it a client that sends half a head holds its connection for ever, and ten thousand idle ones take every
descriptor that healthy devices need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from nexhb import log, metrics
from nexhb.http.problem import Problem

_log = log.get("http")


class Connections:
    """All connections of one daemon. Only the event loop's thread touches it."""

    def __init__(self, *, most: int, head_timeout_s: float) -> None:
        self.most = most
        metrics.connections_limit.set(most)
        self.head_timeout_s = head_timeout_s
        self._open: set[Guarded] = set()
        # Those that never showed a valid key, the oldest first: the ones to go when there are too many.
        self._unproven: dict[Guarded, None] = {}

    def factory(self, server: web.Server, **options: Any) -> Callable[[], Guarded]:
        """What asyncio calls for each connection. `options` as aiohttp's RequestHandler takes them."""
        loop = asyncio.get_running_loop()
        return lambda: Guarded(self, server, loop=loop, **options)

    def opened(self, connection: Guarded) -> None:
        """One more; over the bound, the oldest that never showed a key goes, or the new one itself."""
        self._open.add(connection)
        self._unproven[connection] = None
        if len(self._open) > self.most:
            next(iter(self._unproven)).cut("too_many")

    def closed(self, connection: Guarded) -> None:
        """One less."""
        self._open.discard(connection)
        self._unproven.pop(connection, None)

    def proven(self, connection: Guarded) -> None:
        """It showed a valid key."""
        self._unproven.pop(connection, None)

    def sweep(self, now: float) -> None:
        """Cut those whose request's head has not come to its end in time; called now and then, by the loop's clock."""
        metrics.connections_open.set(len(self._open))
        late = [
            one for one in self._open if one.awaits_head_since and now - one.awaits_head_since > self.head_timeout_s
        ]
        for one in late:
            one.cut("slow_head")


class Guarded(RequestHandler):
    """aiohttp's connection, watched."""

    __slots__ = ("_connections", "waiting_since")

    def __init__(self, connections: Connections, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._connections = connections
        self.waiting_since = 0.0  # s, since when a head is awaited that has begun, or the first one; 0 while none is

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self.waiting_since = self._loop.time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._messages or self._current_request is not None:
            self.waiting_since = 0.0  # a whole head is there; its body has a timeout of its own
        elif not self.waiting_since:
            self.waiting_since = self._loop.time()

    @property
    def awaits_head_since(self) -> float:
        """s, the loop's clock; 0 while it does not, or is busy with a request."""
        return 0.0 if self._messages or self._current_request is not None else self.waiting_since

    def prove(self) -> None:
        """Its request, which is being answered, carried a valid key."""
        self.waiting_since = 0.0
        self._connections.proven(self)

    def cut(self, reason: str) -> None:
        """Close it now."""
        metrics.connections_cut.labels(reason=reason).inc()
        self._connections.closed(self)
        self.force_close()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is no HTTP, answered as every other error is. Nothing of it is repeated: it may hold a key."""
        if status < 500:
            _log.warning("http.bad_request_line", error=type(exc).__name__)
            return Problem(status, "This is not a valid HTTP request.", close=True).response()
        self.log_exception("Unhandled exception", exc_info=exc)
        return Problem(status, "An unexpected error; it is in the log.", close=True).response()
