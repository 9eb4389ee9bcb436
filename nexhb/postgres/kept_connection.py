"""One connection that is kept open between its uses."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nexhb.postgres.connections import Connection, Database


class KeptConnection:
    """A connection that is opened at its first use, and again after it was lost. `options` are those of
    Database.connect. Only one coroutine at a time may use it."""

    def __init__(self, database: Database, **options: Any) -> None:
        self._database = database
        self._options = options
        self._conn: Connection | None = None

    async def get(self) -> Connection:
        """Return the open connection. Raise DatabaseUnavailable."""
        if self._conn is None or self._conn.is_closed():
            self._conn = await self._database.connect(**self._options)
        return self._conn

    def terminate(self) -> None:
        """End the connection at once, also while it is in use; the next use opens a new connection."""
        if self._conn is not None:
            self._conn.terminate()

    async def close(self) -> None:
        """Close the connection. An error means that it was lost already."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(Exception):
                await conn.close(timeout=2)
