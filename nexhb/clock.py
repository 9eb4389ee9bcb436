"""The daemon's clock: the database's, so that every daemon of a database goes by one clock and a host whose clock is
wrong spoils nothing. Between two looks at it, time passes by the host's monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from nexhb import log, metrics, sql
from nexhb.db import Connection

_Q = sql.queries("db")
_log = log.get("clock")

MOVED_S = 30.0  # a database's clock that moves by more than that against monotonic time is said so
# ingest.accept_future's default: from here on a device's clock that is right is taken for wrong.
APART_MOST = timedelta(minutes=5)
TRUE_TO_S = 1.0  # an answer that took longer says too little


def system_now() -> datetime:
    """The host's clock, in UTC."""
    return datetime.now(UTC)


def apart_because(apart: timedelta) -> str:
    """Why a daemon whose clock is `apart` from the database's is not ready; empty where that does no harm."""
    if abs(apart) <= APART_MOST:
        return ""
    side = "behind" if apart < timedelta(0) else "ahead of"
    return (
        f"This host's clock is {abs(apart) // timedelta(seconds=1)} s {side} the database's; "
        "the time of the database is used. Set the clock that is wrong."
    )


async def look(conn: Connection, monotonic: Callable[[], float] = time.monotonic) -> tuple[datetime, float, float]:
    """The database's time, the monotonic time of that moment, and by how many seconds that may be wrong."""
    asked = monotonic()
    database: datetime = await conn.fetchval(_Q["clock"])
    answered = monotonic()
    return database, (asked + answered) / 2, (answered - asked) / 2


class DatabaseClock:
    """Called, the time now. The host's own, until the database's was seen."""

    def __init__(
        self, system: Callable[[], datetime] = system_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._system = system
        self._monotonic = monotonic
        self._base = system().timestamp() - monotonic()  # s; what monotonic time lacks
        self._learned = False
        self.apart = timedelta(0)  # how far the host's clock is ahead of the database's

    def __call__(self) -> datetime:
        return datetime.fromtimestamp(self._base + self._monotonic(), UTC)

    async def learn(self, conn: Connection) -> None:
        """Take the database's time. An answer that only confirms what is known changes nothing, so that time does not
        go back and forth by a network's jitter."""
        database, at, wrong_by_s = await look(conn, self._monotonic)
        if wrong_by_s > TRUE_TO_S:
            return
        base = database.timestamp() - at
        moved_s = base - self._base
        self.apart = self._system() - datetime.fromtimestamp(base + self._monotonic(), UTC)
        metrics.clock_apart.set(self.apart.total_seconds())
        if abs(moved_s) <= wrong_by_s:
            return
        if abs(moved_s) > MOVED_S:
            say = _log.warning if self._learned else _log.info
            say("clock.moved", seconds=round(moved_s, 3), host_ahead_s=round(self.apart.total_seconds(), 3))
        self._base, self._learned = base, True
