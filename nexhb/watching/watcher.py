"""The watcher: a periodic task that one daemon of a database runs, under an advisory lock on its own connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from nexhb import availability, log, metrics
from nexhb.errors import LockHeld, described
from nexhb.postgres import locks, sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.identity import DatabaseTracker
from nexhb.postgres.kept_connection import KeptConnection
from nexhb.postgres.locks import Lock
from nexhb.watching import adopting, settling
from nexhb.watching.judging import Rules
from nexhb.watching.rounds import Round

_Q = sql.queries("watching")
_log = log.get("watch")

STATEMENT_TIMEOUT_S = 30.0
# After this time, every silent device is looked at, whatever earlier rounds have judged.
FULL_SCAN_EVERY = timedelta(minutes=10)
# Heartbeats have just written what the watcher reads, so that it is in memory: without the second setting, PostgreSQL
# would rather read a million rows than ten thousand by their keys. The third leaves the other cores to heartbeats.
SESSION = {"jit": "off", "random_page_cost": "1.1", "max_parallel_workers_per_gather": "0"}
CLOCK_MOVED_S = 30.0  # the database's clock against monotonic time, between two rounds


class Watcher:
    """Run rounds until cancelled. While another daemon holds the lock, do nothing."""

    def __init__(
        self,
        database: Database,
        rules: Rules,
        interval_s: float,
        now: Callable[[], datetime],
        *,
        tracker: DatabaseTracker | None = None,
        tell: Callable[[Connection, datetime], Awaitable[None]] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._interval_s = interval_s
        self._now = now
        self._tell = tell  # called at the end of each round, on the connection that holds the lock
        self._monotonic = monotonic
        self._conn = KeptConnection(
            database,
            application="nexhb watch",
            command_timeout_s=STATEMENT_TIMEOUT_S,
            lock_timeout="5000",
            tcp_keepalives_idle="30",
            tcp_keepalives_interval="10",
            tcp_keepalives_count="3",
            **SESSION,
        )
        self._silent_since: datetime | None = None  # silent devices last heard before this were judged already
        self._full_scan_at: datetime | None = None
        self._last: tuple[datetime, float] | None = None  # the database's time and monotonic time of the last round
        self._hold_until: datetime | None = None  # silence is not judged before, because the clock has moved
        if tracker is not None:
            tracker.on_change(self._forget)
        self._replaced = False

    def _forget(self) -> None:
        """Adopt the state in the next round: the database was replaced."""
        self._replaced = True
        self._conn.terminate()

    async def run(self) -> None:
        """Run a round every `interval_s` until cancelled. A round that fails is repeated."""
        try:
            while True:
                try:
                    await self._run_while_locked()
                except LockHeld:
                    pass  # another daemon watches
                except FROM_THE_DATABASE as error:
                    _log.warning("watch.failed", error=described(error))
                    await self._conn.close()
                except Exception:
                    _log.exception("watch.failed")
                    await self._conn.close()
                await asyncio.sleep(self._interval_s)
        finally:
            await self._conn.close()

    async def _run_while_locked(self) -> None:
        conn = await self._conn.get()
        async with locks.held(conn, Lock.WATCH, wait=False):
            self._silent_since = None
            while True:
                await self.round(conn)
                await asyncio.sleep(self._interval_s)

    async def round(self, conn: Connection) -> None:
        """Run one round on `conn`, which holds the lock."""
        started, now = self._monotonic(), self._now()
        presence = await availability.read(conn, now, self._rules.interval)
        await adopting.adopt_if_needed(conn, self._rules, presence, replaced=self._replaced)
        if self._replaced or self._full_scan_is_due(now):
            self._replaced, self._silent_since, self._full_scan_at = False, None, now
        one = Round(conn, self._rules, None if self._is_held(now, started) else presence, now)
        await one.judge_changes()
        await one.judge_due()
        if one.presence is not None:
            self._silent_since = await one.judge_silent(self._silent_since)
        await settling.settle(conn, self._rules, presence, now)
        await one.tidy()
        if self._tell is not None:
            await self._tell(conn, now)
        await conn.execute(_Q["round_done"], now)
        metrics.watch_rounds.inc()
        metrics.watch_last_round.set(now.timestamp())
        metrics.watch_round_duration.observe(self._monotonic() - started)

    def _full_scan_is_due(self, now: datetime) -> bool:
        last = self._full_scan_at
        return last is None or not last <= now <= last + FULL_SCAN_EVERY

    def _is_held(self, now: datetime, monotonic: float) -> bool:
        """Return whether silence may not be judged, because the database's clock was moved a short while ago."""
        if self._last is not None:
            moved = (now - self._last[0]).total_seconds() - (monotonic - self._last[1])
            if abs(moved) > CLOCK_MOVED_S:
                self._hold_until = now + self._rules.thresholds.offline_after
                _log.warning("watch.clock_moved", seconds=round(moved), hold_until=self._hold_until)
        self._last = now, monotonic
        return self._hold_until is not None and now < self._hold_until
