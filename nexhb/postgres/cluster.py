"""The PostgreSQL that stores the heartbeats: the server of database.url, or the embedded PostgreSQL, which the daemon
or a command starts and restarts as needed."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from nexhb import log
from nexhb.config import Settings
from nexhb.errors import EmbeddedPostgresError, NexhbError, NoDatabase
from nexhb.postgres import embedded
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.postmaster import Progress
from nexhb.postgres.session import TableSchema

_log = log.get("cluster")

_REMEDY = (
    "If the daemon has another data_dir or database.url, name it (--config, NEXHB_DATA_DIR, NEXHB_DATABASE__URL), or "
    "run this command as the daemon's user; `nexhb serve` and `nexhb migrate` create a new database."
)
ALIVE_CHECK_S = 0.5  # how often to check that the postmaster process is alive
PROBE_EVERY_S = 5.0  # how often to open a connection, and how long that may take
MAX_SILENT_PROBES = 3  # restart a living postmaster after this many consecutive probes without an answer
MAX_STALLED_PROBES = 24  # restart a postmaster after this many consecutive probes during a start that makes no progress


class ProbeResult(enum.Enum):
    """A postmaster's answer to a connection attempt."""

    ACCEPTS = "accepts"  # a session, or an error that a running server returns: too many connections, a wrong role
    STARTING = "starting"  # PostgreSQL is starting or stopping, or recovering from a crash
    SILENT = "silent"


@dataclass
class PostmasterProbes:
    """Decide whether a postmaster that is alive must be restarted. Pure.

    It counts probes instead of measuring time: a daemon that was frozen together with the machine has sent no probe
    meanwhile.
    """

    silent: int = 0
    stalled: int = 0
    last_progress: Progress = ()

    def is_stuck(self, result: ProbeResult, progress: Progress) -> bool:
        """Record a probe, and return whether to restart the postmaster. `progress`: the state of its crash recovery."""
        self.silent = self.silent + 1 if result is ProbeResult.SILENT else 0
        # A recovery may take an hour, as long as it makes progress.
        self.stalled = self.stalled + 1 if result is ProbeResult.STARTING and progress == self.last_progress else 0
        self.last_progress = progress
        return self.silent >= MAX_SILENT_PROBES or self.stalled >= MAX_STALLED_PROBES


@dataclass
class Cluster:
    """The database, and the embedded PostgreSQL that serves it if database.url is not set."""

    database: Database
    server: embedded.EmbeddedPostgres | None = None

    async def watch(self, data_dir: Path) -> None:
        """Restart the embedded PostgreSQL if its postmaster was killed or accepts no connections: nothing else restarts
        it. Never returns."""
        # If a postmaster of another container was adopted, its process is not visible here, so its end cannot be
        # detected.
        seen_alive = self.server is not None and self.server.alive
        probes, next_probe_at = PostmasterProbes(), 0.0
        while True:
            await asyncio.sleep(ALIVE_CHECK_S)
            try:
                alive = self.server is not None and self.server.alive
            except OSError as error:  # no file descriptor is left for the check: the postmaster may be alive
                _log.error("embedded.not_seen", error=str(error))
                continue
            seen_alive = seen_alive or alive
            if self.server is None or not seen_alive:
                continue
            if alive:
                now = asyncio.get_running_loop().time()
                if now < next_probe_at:
                    continue
                result = await _probe(self.server.dsn)
                next_probe_at = now + PROBE_EVERY_S
                progress = self.server.recovery_progress() if result is ProbeResult.STARTING else ()
                if not probes.is_stuck(result, progress):
                    continue
                _log.error("embedded.accepts_nobody", pgdata=str(self.server.pgdata), silent=probes.silent)
            else:
                _log.error("embedded.died", pgdata=str(self.server.pgdata))
            probes = PostmasterProbes()
            try:
                await asyncio.to_thread(self.server.stop)
                self.server = await _start_embedded(data_dir, create=False)
            except (NexhbError, RuntimeError, MemoryError) as error:  # no thread could be started, or no memory is left
                _log.error("embedded.not_started", error=str(error) or type(error).__name__)
                await asyncio.sleep(5)


async def _probe(dsn: str) -> ProbeResult:
    """Open a session, as a client does, and return the postmaster's answer."""
    try:
        conn = await asyncpg.connect(dsn, timeout=PROBE_EVERY_S)
    except asyncpg.CannotConnectNowError:
        return ProbeResult.STARTING
    except asyncpg.PostgresError:
        return ProbeResult.ACCEPTS
    except FROM_THE_DATABASE:
        return ProbeResult.SILENT
    conn.terminate()
    return ProbeResult.ACCEPTS


async def _start_embedded(data_dir: Path, *, create: bool) -> embedded.EmbeddedPostgres:
    starting = asyncio.ensure_future(
        asyncio.to_thread(embedded.start, data_dir, create=create, log=log.get("embedded").info)
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # A thread cannot be cancelled: stop the server once the thread has started it.
        server = await starting
        await asyncio.to_thread(server.stop)
        raise


@asynccontextmanager
async def open_cluster(settings: Settings, *, create: bool) -> AsyncIterator[Cluster]:
    """Return the database of database.url, else the embedded PostgreSQL, started if it is not running. A cluster that
    does not exist is created only with `create`: otherwise a command run by another user, or in another folder, would
    leave an empty cluster that no daemon uses."""
    schema = TableSchema(settings.database.schema_name)
    if settings.database.url is not None:
        yield Cluster(Database(settings.database.url.get_secret_value(), schema))
        return
    try:
        server = await _start_embedded(settings.data_dir, create=create)
    except (NoDatabase, EmbeddedPostgresError) as error:
        raise type(error)(f"{error.detail} {_location(settings)}", hint=error.hint or _REMEDY) from error
    cluster = Cluster(Database(server.dsn, schema), server)
    try:
        yield cluster
    finally:
        if cluster.server is not None:
            await asyncio.to_thread(cluster.server.stop)


def _location(settings: Settings) -> str:
    """Return where nexhb looked for its database, and why there."""
    return (
        f"database.url is not set; data_dir is {settings.data_dir}: {settings.data_dir_from}; "
        f"the configuration file is {settings.file or 'none'}."
    )


@asynccontextmanager
async def open_database(settings: Settings, *, create: bool = False) -> AsyncIterator[Database]:
    """Open the database for a command, with or without a running daemon."""
    async with open_cluster(settings, create=create) as cluster:
        yield cluster.database


@asynccontextmanager
async def open_connection(settings: Settings, *, create: bool = False, **options: Any) -> AsyncIterator[Connection]:
    """Open one connection for a command that needs no more. `options` are those of Database.connect."""
    async with open_database(settings, create=create) as database, database.connected(**options) as conn:
        yield conn
