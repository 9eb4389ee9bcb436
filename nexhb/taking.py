"""The row that every ready daemon renews, the blackouts between its renewals, and the daemon's clock.

A daemon that takes heartbeats says so by a commit every RENEW_S; where none did,
nexhb could not have heard anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from nexhb import log, sql
from nexhb.clock import DatabaseClock
from nexhb.db import Connection, Database
from nexhb.pgerrors import FROM_THE_DATABASE
from nexhb.presence import AHEAD_MOST, RENEW_S, Presence, Span, Taking, presence, renewed

_Q = sql.queries("presence")
_log = log.get("presence")

BLACKOUTS_MOST = 200  # looked back over, so that a daemon that fails again and again costs a read 10 ms at the most
KEPT = timedelta(days=400)


async def read(conn: Any, now: datetime, interval: timedelta) -> Presence:
    """What the database says at `now`. `conn`: a connection or a pool's."""
    row = await conn.fetchrow(_Q["presence"], now, BLACKOUTS_MOST)
    taking = None if row["since"] is None else Taking(row["since"], row["renewed_at"])
    blackouts = [Span(began, ended) for began, ended in zip(row["began"], row["ended"], strict=True)]
    return presence(now, taking, blackouts, interval)


async def renew(conn: Connection, now: datetime) -> Span | None:
    """Confirm that heartbeats are taken at `now`, in a transaction of its own; the blackout that this ends, if any."""
    async with conn.transaction():
        row = await conn.fetchrow(_Q["hold"])
        taking, gap = renewed(None if row is None else Taking(row["since"], row["renewed_at"]), now)
        await conn.execute(_Q["renew"], taking.since, taking.renewed_at)
        if gap is not None:
            await conn.execute(_Q["add_blackout"], gap.start, gap.end)
        if taking.since == now:  # it begins anew: behind a gap, or behind a clock that was ahead
            await conn.execute(_Q["forget"], now - KEPT, now + AHEAD_MOST)
    return gap


class Keeper:
    """The daemon's own: renews while heartbeats are taken, and keeps the daemon's clock true."""

    def __init__(
        self, database: Database, clock: DatabaseClock, takes: Callable[[], bool], looked: Callable[[], None]
    ) -> None:
        self._database = database
        self._clock = clock
        self._takes = takes  # whether a heartbeat that comes now can be committed
        self._looked = looked  # called after each look at the database's clock
        self._conn: Connection | None = None

    async def run(self) -> None:
        """Renew every RENEW_S until cancelled. While the database is away nothing is renewed, and that is the gap."""
        try:
            while True:
                try:
                    await self._once()
                except FROM_THE_DATABASE as error:
                    _log.info("presence.not_renewed", error=f"{type(error).__name__}: {error}")
                    await self._disconnect()
                await asyncio.sleep(RENEW_S)
        finally:
            await self._disconnect()

    async def _once(self) -> None:
        if self._conn is None or self._conn.is_closed():
            self._conn = await self._database.connect(
                application="nexhb presence", timeout_s=RENEW_S, command_timeout_s=RENEW_S, lock_timeout="3000"
            )
        await self._clock.learn(self._conn)
        self._looked()
        if self._takes() and (gap := await renew(self._conn, self._clock())):
            _log.warning("blackout.ended", began_at=gap.start, ended_at=gap.end)

    async def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(Exception):
                await conn.close(timeout=2)
