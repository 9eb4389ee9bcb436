"""A connection during its TLS handshake."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from nexhb import metrics
from nexhb.http.transport.connections import Connections


class Handshake(asyncio.Protocol):
    """A connection during its TLS handshake. With asyncio's own handshake it would not count as a connection, and
    could take a minute."""

    def __init__(self, connections: Connections, tls: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        self._connections = connections
        self._tls = tls
        self._make = make
        self._began = 0.0
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and start its time limit."""
        self._transport = cast(asyncio.Transport, transport)
        self._began = asyncio.get_running_loop().time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Remove the connection."""
        self._connections.closed(self)

    def data_received(self, data: bytes) -> None:
        """Start TLS, and pass the first bytes on to it: start_tls receives only the bytes that follow."""
        self._transport.pause_reading()
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._start_tls(loop))
        # Runs two iterations of the loop later: then TLS has been started, but no further bytes have been read.
        loop.call_soon(loop.call_soon, self._pass_on, data)

    def _pass_on(self, data: bytes) -> None:
        tls = self._transport.get_protocol()
        if isinstance(tls, Handshake) or self._transport.is_closing():
            return  # the connection has been cut
        tls = cast(asyncio.BufferedProtocol, tls)
        memoryview(tls.get_buffer(len(data)))[: len(data)] = data
        tls.buffer_updated(len(data))

    async def _start_tls(self, loop: asyncio.AbstractEventLoop) -> None:
        connection = self._make()
        try:
            within_s = self._connections.head_timeout_s
            transport = await loop.start_tls(
                self._transport, connection, self._tls, server_side=True, ssl_handshake_timeout=within_s
            )
        except (OSError, asyncio.CancelledError):  # no TLS or an old version, client gone, timeout, cut
            metrics.connections_cut.labels(reason="handshake").inc()
            self._transport.abort()
            transport = None
        self._connections.closed(self)
        # By now a request may wait in aiohttp's queue, or the client may have closed the connection.
        if transport is not None and not transport.is_closing():
            connection.connection_made(transport)

    def overdue(self, now: float, within_s: float) -> str:
        """Return "slow_handshake" if the handshake takes longer than `within_s`, else ''."""
        return "slow_handshake" if now - self._began > within_s else ""

    def cut(self, reason: str) -> None:
        """Close the connection at once."""
        metrics.connections_cut.labels(reason=reason).inc()
        self._connections.closed(self)
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()
