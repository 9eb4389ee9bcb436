"""Prepare the database for the daemon: wait for it, check its settings and its clock, migrate its schema, create the
days ahead. While the daemon runs, the settings are checked again, and further days are created."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from nexhb import clock, log, partitions
from nexhb.clock import DatabaseClock
from nexhb.config import Settings
from nexhb.errors import DatabaseUnavailable, DatabaseUnfit, PoolerBetween, described
from nexhb.postgres import connections, migrate, numbers
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import Kind, classify, is_retryable
from nexhb.readiness import Readiness, Source

_log = log.get("daemon")

DATABASE_WAIT_S = 60.0  # how long a start waits for a database.url that does not answer yet
SETTINGS_S = 60.0  # how often to check the settings


async def prepare(database: Database, settings: Settings, readiness: Readiness, now: Callable[[], datetime]) -> None:
    """Check the settings of the database, migrate its schema and create partitions. If the database goes away
    meanwhile, wait as for a database that has not started yet."""
    until_s = time.monotonic() + DATABASE_WAIT_S
    while True:
        conn = await _wait_for_database(database, until_s)
        try:
            _refuse_pooler(await _check_settings(conn, settings, readiness))
            if isinstance(now, DatabaseClock):
                await now.learn(conn)
            note_clock(readiness, now)
            await migrate.migrate(conn, now())
            await connections.check_tables(conn)
            await partitions.ensure(conn, window_days(settings, now()))
            await numbers.raise_sequences(conn)
        except Exception as error:
            if isinstance(error, DatabaseUnfit) or classify(error) is not Kind.LOST or time.monotonic() > until_s:
                raise
            _log.warning("database.waiting", error=described(error))
            await asyncio.sleep(1)
        else:
            return
        finally:
            await conn.close(timeout=5)


async def _wait_for_database(database: Database, until_s: float) -> connections.Connection:
    """Open a connection. Until `until_s` of the monotonic clock, retry if the database has not started yet."""
    while True:
        try:
            return await database.connect(application="nexhb start", lock_timeout="30000")
        except DatabaseUnavailable as error:
            # A wrong password, a missing or unusable database, or a pooler needs an operator.
            if (
                time.monotonic() > until_s
                or isinstance(error, DatabaseUnfit)
                or not is_retryable(error.__cause__ or error)
            ):
                raise
            _log.warning("database.waiting", error=str(error))
            await asyncio.sleep(1)


def _refuse_pooler(hazards: list[connections.Hazard]) -> None:
    if connections.POOLER in hazards:
        raise PoolerBetween  # a migration might acquire its lock in one session and release it in another


async def _check_settings(
    conn: connections.Connection, settings: Settings, readiness: Readiness
) -> list[connections.Hazard]:
    """Return the hazards, after reporting them in /readyz and the log."""
    hazards = await connections.unsafe_settings(conn)
    blocks = connections.POOLER in hazards or (hazards and not settings.database.accept_unsafe_settings)
    reason = f"The database does not keep what it commits: {'; '.join(map(str, hazards))}." if blocks else ""
    if reason != readiness.reason(Source.SETTINGS):
        _log.error("database.unsafe", found=[str(hazard) for hazard in hazards])
    readiness.set(Source.SETTINGS, reason)
    return hazards


async def watch_settings(settings: Settings, database: Database, readiness: Readiness) -> None:
    """Check the settings once a minute: fsync may be turned off or on while the daemon runs. Never returns."""
    while True:
        await asyncio.sleep(SETTINGS_S)
        try:
            async with database.connected(application="nexhb settings", command_timeout_s=10) as conn:
                await _check_settings(conn, settings, readiness)
        except Exception as error:
            # The database is down or restarting, which the writer detects and reports itself.
            _log.info("database.settings_not_read", error=described(error))


def note_clock(readiness: Readiness, now: Callable[[], datetime]) -> None:
    """Report not ready while this host's clock and the database's are far apart. One of them is wrong; another daemon,
    whose clock agrees with the database's, should receive the heartbeats. This daemon still accepts them, and stores
    the database's time."""
    reason = clock.apart_because(now.apart) if isinstance(now, DatabaseClock) else ""
    if reason and not readiness.reason(Source.CLOCK):
        _log.warning("clock.apart", why=reason)
    readiness.set(Source.CLOCK, reason)


def window_days(settings: Settings, now: datetime) -> list[Any]:
    """Return the days that heartbeats may belong to now, and the days that are created ahead."""
    first = (now - settings.ingest.accept_past).date()
    return partitions.days_between(first, now.date() + timedelta(days=settings.partitions.days_ahead))


async def create_days_ahead(settings: Settings, database: Database, now: Callable[[], datetime]) -> None:
    """Create the days ahead every hour. The nightly run does so too, but ingest must go on if its schedule is off."""
    while True:
        await asyncio.sleep(3600)
        try:
            async with database.connected(application="nexhb partitions") as conn:
                await partitions.ensure(conn, window_days(settings, now()))
        except Exception:
            # Two weeks of days exist, and the writer creates a missing one: a retry in an hour is soon enough.
            _log.exception("partition.ensure_failed")
