"""All connections of a daemon, and limits that aiohttp does not have: on the number of connections, and on the time
for a TLS handshake, for the head of a request and for reading a response.

Without these limits a client that sends half a head, or never reads its response, would hold its connection forever,
and ten thousand idle connections would use up the file descriptors that healthy devices need.
"""

from __future__ import annotations

from typing import Protocol

from nexhb import metrics


class _Connection(Protocol):
    """A TCP connection, during its TLS handshake or after."""

    def overdue(self, now: float, within_s: float) -> str:
        """Return the reason why the connection has to be cut at `now`, or '' if it is in time."""

    def cut(self, reason: str) -> None:
        """Close the connection at once."""


class Connections:
    """All connections of one daemon. Only the thread of the event loop may use it."""

    def __init__(self, *, max_connections: int, head_timeout_s: float) -> None:
        self.max_connections = max_connections
        metrics.connections_limit.set(max_connections)
        self.head_timeout_s = head_timeout_s
        self._open: set[_Connection] = set()
        # Connections that have not sent a valid key, oldest first: the first to be cut when there are too many.
        self._unauthenticated: dict[_Connection, None] = {}

    def opened(self, connection: _Connection) -> None:
        """Add a connection. If there are too many, cut the oldest unauthenticated one, which may be the new one."""
        self._open.add(connection)
        self._unauthenticated[connection] = None
        if len(self._open) > self.max_connections:
            next(iter(self._unauthenticated)).cut("too_many")

    def closed(self, connection: _Connection) -> None:
        """Remove a connection."""
        self._open.discard(connection)
        self._unauthenticated.pop(connection, None)

    def authenticated(self, connection: _Connection) -> None:
        """Record that the connection has sent a valid key."""
        self._unauthenticated.pop(connection, None)

    def is_authenticated(self, connection: _Connection) -> bool:
        """Return whether the connection has sent a valid key."""
        return connection not in self._unauthenticated

    def sweep(self, now: float) -> None:
        """Cut the connections that exceed a time limit at `now` (the loop's clock). Called at intervals."""
        metrics.connections_open.set(len(self._open))
        overdue = [(conn, reason) for conn in self._open if (reason := conn.overdue(now, self.head_timeout_s))]
        for connection, reason in overdue:
            connection.cut(reason)

    def cut_all(self, kind: type[object], reason: str) -> None:
        """Cut every connection that is an instance of `kind`."""
        for connection in [conn for conn in self._open if isinstance(conn, kind)]:
            connection.cut(reason)
