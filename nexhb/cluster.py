"""Where the heartbeats go: database.url, or the embedded PostgreSQL, started and kept up by whoever needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexhb import embedded, log
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.errors import EmbeddedPostgresError, NexhbError, NoDatabase
from nexhb.session import Home

_log = log.get("cluster")

_REMEDY = (
    "If the daemon has another data_dir or database.url, name it (--config, NEXHB_DATA_DIR, NEXHB_DATABASE__URL), or "
    "run this command as the daemon's user; `nexhb serve` and `nexhb migrate` make a new database."
)
LOOK_S = 0.5  # how often it is looked whether the postmaster lives


@dataclass
class Cluster:
    """Where the heartbeats go, and the embedded PostgreSQL behind it if it is that."""

    database: Database
    server: embedded.EmbeddedPostgres | None = None

    async def watch(self, data_dir: Path) -> None:
        """Start the embedded PostgreSQL again should its postmaster be killed: nobody else would. Never returns."""
        # An adopted postmaster of another container cannot be seen, and so cannot be seen dying.
        seen_alive = self.server is not None and self.server.alive
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                alive = self.server is not None and self.server.alive
            except OSError as error:  # not that it is dead: no open file is left to look with
                _log.error("embedded.not_seen", error=str(error))
                continue
            seen_alive = seen_alive or alive
            if self.server is None or alive or not seen_alive:
                continue
            _log.error("embedded.died", pgdata=str(self.server.pgdata))
            try:
                await asyncio.to_thread(self.server.stop)
                self.server = await _start_embedded(data_dir, create=False)
            except NexhbError as error:
                _log.error("embedded.not_started", error=str(error))
                await asyncio.sleep(5)


async def _start_embedded(data_dir: Path, *, create: bool) -> embedded.EmbeddedPostgres:
    starting = asyncio.ensure_future(
        asyncio.to_thread(embedded.start, data_dir, create=create, log=log.get("embedded").info)
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # A thread cannot be cancelled: what it starts is stopped once it stands.
        server = await starting
        await asyncio.to_thread(server.stop)
        raise


@asynccontextmanager
async def open_cluster(settings: Settings, *, create: bool) -> AsyncIterator[Cluster]:
    """database.url, else the embedded PostgreSQL, started now unless it runs. Where it was never made it is made only
    if `create`: a command of another user, or in another folder, would leave an empty one that no daemon uses."""
    home = Home(settings.database.schema_name)
    if settings.database.url is not None:
        yield Cluster(Database(settings.database.url.get_secret_value(), home))
        return
    try:
        server = await _start_embedded(settings.data_dir, create=create)
    except (NoDatabase, EmbeddedPostgresError) as error:
        raise type(error)(f"{error.detail} {_looked(settings)}", hint=error.hint or _REMEDY) from error
    cluster = Cluster(Database(server.dsn, home), server)
    try:
        yield cluster
    finally:
        if cluster.server is not None:
            await asyncio.to_thread(cluster.server.stop)


def _looked(settings: Settings) -> str:
    """Where nexhb looked for its database, and why there."""
    return (
        f"database.url is not set; data_dir is {settings.data_dir}: {settings.data_dir_from}; "
        f"the configuration file is {settings.file or 'none'}."
    )


@asynccontextmanager
async def open_database(settings: Settings, *, create: bool = False) -> AsyncIterator[Database]:
    """The same for a command, beside a running daemon or without one."""
    async with open_cluster(settings, create=create) as cluster:
        yield cluster.database


@asynccontextmanager
async def open_connection(settings: Settings, *, create: bool = False, **how: Any) -> AsyncIterator[Connection]:
    """And one connection to it, for a command that needs no more; `how` as Database.connect takes it."""
    async with open_database(settings, create=create) as database, database.connected(**how) as conn:
        yield conn
