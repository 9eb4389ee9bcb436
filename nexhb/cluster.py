"""Where the heartbeats go: database.url, or the embedded PostgreSQL, started and kept up by whoever needs it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from nexhb import embedded, log
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.embedded import Progress
from nexhb.errors import EmbeddedPostgresError, NexhbError, NoDatabase
from nexhb.pgerrors import FROM_THE_DATABASE
from nexhb.session import Home

_log = log.get("cluster")

_REMEDY = (
    "If the daemon has another data_dir or database.url, name it (--config, NEXHB_DATA_DIR, NEXHB_DATABASE__URL), or "
    "run this command as the daemon's user; `nexhb serve` and `nexhb migrate` make a new database."
)
LOOK_S = 0.5  # how often it is looked whether the postmaster lives
KNOCK_EVERY_S = 5.0  # how often it is asked for a connection, and how long that may take
SILENT_KNOCKS = 3  # in a row that nobody answered: it lives, and accepts nobody
STILL_KNOCKS = 24  # in a row at which it was starting, and nothing had moved


class Answer(enum.Enum):
    """What a postmaster says to one who knocks."""

    HERE = "here"  # a session, or a reason why there is none: too many of them, a wrong role
    STARTING = "starting"  # or stopping, or recovering from a crash
    NONE = "none"


@dataclass
class Knocks:
    """Whether a postmaster that lives has to be started anew. Pure.

    Counted and not timed: a daemon that stood still itself, with the whole machine, has not knocked meanwhile.
    """

    silent: int = 0
    still: int = 0
    moved: Progress = ()

    def note(self, answer: Answer, progress: Progress) -> bool:
        """Whether this answer is one too many; `progress` is what its recovery has done so far."""
        self.silent = self.silent + 1 if answer is Answer.NONE else 0
        # A recovery may take an hour, as long as it gets on.
        self.still = self.still + 1 if answer is Answer.STARTING and progress == self.moved else 0
        self.moved = progress
        return self.silent >= SILENT_KNOCKS or self.still >= STILL_KNOCKS


@dataclass
class Cluster:
    """Where the heartbeats go, and the embedded PostgreSQL behind it if it is that."""

    database: Database
    server: embedded.EmbeddedPostgres | None = None

    async def watch(self, data_dir: Path) -> None:
        """Start the embedded PostgreSQL again should its postmaster be killed, or live and accept nobody: nobody else
        would. Never returns."""
        # An adopted postmaster of another container cannot be seen, and so cannot be seen dying.
        seen_alive = self.server is not None and self.server.alive
        knocks, knock_at = Knocks(), 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                alive = self.server is not None and self.server.alive
            except OSError as error:  # not that it is dead: no open file is left to look with
                _log.error("embedded.not_seen", error=str(error))
                continue
            seen_alive = seen_alive or alive
            if self.server is None or not seen_alive:
                continue
            if alive:
                now = asyncio.get_running_loop().time()
                if now < knock_at:
                    continue
                answer = await _knock(self.server.dsn)
                knock_at = now + KNOCK_EVERY_S
                moved = self.server.recovery_progress() if answer is Answer.STARTING else ()
                if not knocks.note(answer, moved):
                    continue
                _log.error("embedded.accepts_nobody", pgdata=str(self.server.pgdata), silent=knocks.silent)
            else:
                _log.error("embedded.died", pgdata=str(self.server.pgdata))
            knocks = Knocks()
            try:
                await asyncio.to_thread(self.server.stop)
                self.server = await _start_embedded(data_dir, create=False)
            except (NexhbError, RuntimeError, MemoryError) as error:  # there is no thread to be had, or no memory
                _log.error("embedded.not_started", error=str(error) or type(error).__name__)
                await asyncio.sleep(5)


async def _knock(dsn: str) -> Answer:
    """Ask for a session, as whoever comes next will."""
    try:
        conn = await asyncpg.connect(dsn, timeout=KNOCK_EVERY_S)
    except asyncpg.CannotConnectNowError:
        return Answer.STARTING
    except asyncpg.PostgresError:
        return Answer.HERE
    except FROM_THE_DATABASE:
        return Answer.NONE
    conn.terminate()
    return Answer.HERE


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
