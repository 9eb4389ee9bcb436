"""Record when nexhb accepts heartbeats: a row that every ready daemon renews, and the blackouts between its renewals.

A daemon that accepts heartbeats commits a renewal every RENEW_INTERVAL_S. While no daemon renewed the row, nexhb could
not have received a heartbeat from any device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from nexhb import log
from nexhb.clock import DatabaseClock
from nexhb.devices.presence import (
    MAX_CLOCK_AHEAD,
    RENEW_INTERVAL_S,
    Presence,
    ServicePeriod,
    Span,
    presence_at,
    renewed_period,
)
from nexhb.errors import described
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.kept_connection import KeptConnection

_Q = sql.queries("availability")
_log = log.get("presence")

MAX_BLACKOUTS = 200  # of which a read considers no more: even if a daemon fails repeatedly, they cost it 10 ms at most
KEEP_BLACKOUTS = timedelta(days=400)


async def read(conn: Any, now: datetime, interval: timedelta) -> Presence:
    """Return the presence at `now` from the database. `conn`: a connection, or one from a pool."""
    row = await conn.fetchrow(_Q["presence"], now, MAX_BLACKOUTS)
    period = None if row["since"] is None else ServicePeriod(row["since"], row["renewed_at"])
    blackouts = [Span(began, ended) for began, ended in zip(row["began"], row["ended"], strict=True)]
    return presence_at(now, period, blackouts, interval)


async def renew(conn: Connection, now: datetime) -> Span | None:
    """Record in a transaction of its own that heartbeats are accepted at `now`; return the blackout that this ends."""
    async with conn.transaction():
        row = await conn.fetchrow(_Q["hold"])
        period, gap = renewed_period(None if row is None else ServicePeriod(row["since"], row["renewed_at"]), now)
        await conn.execute(_Q["renew"], period.since, period.renewed_at)
        if gap is not None:
            await conn.execute(_Q["add_blackout"], gap.start, gap.end)
        if period.since == now:  # a new period: after a gap, or after a clock that was ahead
            await conn.execute(_Q["forget"], now - KEEP_BLACKOUTS, now + MAX_CLOCK_AHEAD)
    return gap


class AvailabilityKeeper:
    """The daemon's task that renews the row while heartbeats are accepted, and synchronises the daemon's clock."""

    def __init__(
        self,
        database: Database,
        clock: DatabaseClock,
        can_commit: Callable[[], bool],
        on_clock_read: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._can_commit = can_commit  # whether a heartbeat that arrives now can be committed
        self._on_clock_read = on_clock_read  # called after each reading of the database's clock
        self._conn = KeptConnection(
            database,
            application="nexhb presence",
            timeout_s=RENEW_INTERVAL_S,
            command_timeout_s=RENEW_INTERVAL_S,
            lock_timeout="3000",
        )

    async def run(self) -> None:
        """Renew every RENEW_INTERVAL_S until cancelled. Renewals that fail, as without a database, leave a gap."""
        try:
            while True:
                try:
                    await self._renew()
                except FROM_THE_DATABASE as error:
                    _log.info("presence.not_renewed", error=described(error))
                    await self._conn.close()
                await asyncio.sleep(RENEW_INTERVAL_S)
        finally:
            await self._conn.close()

    async def _renew(self) -> None:
        conn = await self._conn.get()
        await self._clock.learn(conn)
        self._on_clock_read()
        if self._can_commit() and (gap := await renew(conn, self._clock())):
            _log.warning("blackout.ended", began_at=gap.start, ended_at=gap.end)
