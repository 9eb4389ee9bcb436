"""Wake the streams of events in this daemon when any daemon's watcher has recorded something."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nexhb import log
from nexhb.errors import described
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.identity import DatabaseTracker

_Q = sql.queries("events")
_log = log.get("stream")

CHANNEL = "nexhb_events"  # the watcher notifies it (announce in sql/queries/watching.sql)
POLL_S = 1.0  # seconds between two wake-ups, in case a notification is lost
RESPONSE_TIMEOUT_S = 5.0  # seconds; a connection counts as lost if a poll takes longer


class Follower:
    """Listens on one connection, which is open only while a stream is. A stream reads the events itself, from its own
    position, so that a client that reads slowly costs no memory."""

    def __init__(self, database: Database, tracker: DatabaseTracker) -> None:
        self._database = database
        self._streams: set[asyncio.Event] = set()
        self._opened = asyncio.Event()
        self._notified = asyncio.Event()
        self._conn: Connection | None = None
        self.generation = 0  # a stream ends if this has changed: the database was replaced, or the daemon stops
        tracker.on_change(self.end_streams)

    @contextmanager
    def stream(self) -> Iterator[asyncio.Event]:
        """Provide an event that is set whenever there may be new events."""
        changed = asyncio.Event()
        self._streams.add(changed)
        self._opened.set()
        try:
            yield changed
        finally:
            self._streams.discard(changed)

    def end_streams(self) -> None:
        """End every stream of this daemon."""
        self.generation += 1
        if self._conn is not None:
            self._conn.terminate()
        self._wake()

    async def run(self) -> None:
        """Wake the streams until cancelled, reconnecting after errors of the database."""
        while True:
            await self._opened.wait()
            try:
                await self._follow()
            except FROM_THE_DATABASE as error:
                _log.warning("stream.listen_lost", error=described(error))
                await asyncio.sleep(POLL_S)

    async def _follow(self) -> None:
        """Listen while there are streams."""
        conn = await self._database.connect(
            application="nexhb events", command_timeout_s=RESPONSE_TIMEOUT_S, timeout_s=RESPONSE_TIMEOUT_S
        )
        try:
            conn.add_termination_listener(lambda _: self._notified.set())
            await conn.add_listener(CHANNEL, lambda *_: self._notified.set())
            newest: object = None
            self._conn = conn
            while self._streams:
                self._notified.clear()
                found = await conn.fetchrow(_Q["newest"])
                if found != newest:
                    newest = found
                    self._wake()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._notified.wait()
            self._opened.clear()
        finally:
            self._conn = None
            with suppress(Exception):
                await conn.close(timeout=2)

    def _wake(self) -> None:
        for changed in self._streams:
            changed.set()
