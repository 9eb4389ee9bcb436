"""Connections to the database for rare changes: registrations and enrolment keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from nexhb.errors import DatabaseUnavailable
from nexhb.http.unavailability import Unavailability
from nexhb.postgres.connections import Connection, Database

MAX_CHANGES = 4  # connections at once; the embedded PostgreSQL has 60 in all
CHANGE_WAIT_S = 10.0  # longest wait for a connection


class Changes:
    """Opens at most MAX_CHANGES connections at a time: a whole fleet that registers must not use up the writer's
    connections."""

    def __init__(self, database: Database, unavailability: Unavailability) -> None:
        self._database = database
        self._unavailability = unavailability
        self._free = asyncio.Semaphore(MAX_CHANGES)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Open a connection for the block. Raise a 503 Problem if the database is away, or if no connection becomes
        free in time."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(CHANGE_WAIT_S):
                    await stack.enter_async_context(self._free)
                connected = self._database.connected(
                    application="nexhb http", command_timeout_s=10, lock_timeout="3000"
                )
                conn = await stack.enter_async_context(connected)
            except TimeoutError:
                raise self._unavailability.retry_later("Too many changes at once.") from None
            except DatabaseUnavailable as error:
                raise self._unavailability.because_of(error) from error
            yield conn
