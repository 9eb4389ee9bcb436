"""The daemon's clock, which follows the database's: every daemon of a database uses the same time, and a wrong clock of
a host does no harm. Between two readings of the database's clock, time advances by the host's monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from nexhb import log, metrics
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection

_Q = sql.queries("clock")
_log = log.get("clock")

MOVED_S = 30.0  # log a jump of the database's clock, relative to monotonic time, if it is larger
# The default of ingest.accept_future: if the host's clock is further off, devices with correct clocks seem wrong.
MAX_APART = timedelta(minutes=5)
MAX_ERROR_S = 1.0  # a reading of the clock is not used if its error may be larger


def system_now() -> datetime:
    """Return the time of the host's clock, in UTC."""
    return datetime.now(UTC)


def apart_because(apart: timedelta) -> str:
    """Return why a daemon is not ready if its host's clock differs from the database's by `apart`; empty if it is
    ready."""
    if abs(apart) <= MAX_APART:
        return ""
    side = "behind" if apart < timedelta(0) else "ahead of"
    return (
        f"This host's clock is {abs(apart) // timedelta(seconds=1)} s {side} the database's; "
        "nexhb uses the database's time. Set the clock that is wrong."
    )


async def read(conn: Connection, monotonic: Callable[[], float] = time.monotonic) -> tuple[datetime, float, float]:
    """Return the database's time, the monotonic time of that moment, and the largest possible error in seconds."""
    sent_at = monotonic()
    database: datetime = await conn.fetchval(_Q["clock"])
    received_at = monotonic()
    return database, (sent_at + received_at) / 2, (received_at - sent_at) / 2


class DatabaseClock:
    """Return the current time when called. It is the host's time until the first `learn`, and then the database's."""

    def __init__(
        self, system: Callable[[], datetime] = system_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._system = system
        self._monotonic = monotonic
        self._base = system().timestamp() - monotonic()  # s; Unix time less monotonic time
        self._learned = False
        self.apart = timedelta(0)  # how far the host's clock is ahead of the database's

    def __call__(self) -> datetime:
        return datetime.fromtimestamp(self._base + self._monotonic(), UTC)

    async def learn(self, conn: Connection) -> None:
        """Read the database's clock and adopt its time. A reading that agrees within its own error changes nothing, so
        that the time does not jump back and forth with the network's jitter."""
        database, at, error_s = await read(conn, self._monotonic)
        if error_s > MAX_ERROR_S:
            return
        base = database.timestamp() - at
        moved_s = base - self._base
        self.apart = self._system() - datetime.fromtimestamp(base + self._monotonic(), UTC)
        metrics.clock_apart.set(self.apart.total_seconds())
        if abs(moved_s) <= error_s:
            return
        if abs(moved_s) > MOVED_S:
            write = _log.warning if self._learned else _log.info
            write("clock.moved", seconds=round(moved_s, 3), host_ahead_s=round(self.apart.total_seconds(), 3))
        self._base, self._learned = base, True
