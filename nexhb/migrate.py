"""Brings the schema up to date: numbered plain SQL files, each in a transaction, under an advisory lock."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import asyncpg

from nexhb import log, sql
from nexhb.db import Connection, check_version
from nexhb.errors import MigrationError
from nexhb.locks import Lock, held, in_the_way

_Q = sql.queries("migrate")
_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_log = log.get("migrate")

TRIES, PAUSE_S = 10, 5.0  # a minute
LOCK_TIMEOUT_MS = 1_000  # a device's answer has ten seconds
LONGEST_S = 600.0  # one that rewrites the last status of ten million devices; the connection's own limit is for queries


@dataclass(frozen=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find(folder: Path | None = None) -> list[Migration]:
    """The migrations in order. Raises MigrationError where a number is missing or a file is named otherwise."""
    folder = folder or sql.root() / "migrations"
    found: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if not match or int(match[1]) != len(found) + 1:
            raise MigrationError(f"{path.name}: migrations are named 0001_what.sql, 0002_what.sql, …, none left out.")
        found.append(Migration(int(match[1]), path.stem, path.read_text(encoding="utf-8")))
    return found


async def migrate(conn: Connection, now: datetime, migrations: list[Migration] | None = None) -> list[str]:
    """Apply what is missing; the names of what was applied. `conn` is the caller's own.

    Raises MigrationError where an applied file was changed or is missing, or the database is newer than nexhb.
    """
    await check_version(conn)
    migrations = find() if migrations is None else migrations
    done: list[str] = []
    async with held(conn, Lock.MIGRATE, wait=True):
        await conn.execute(_Q["journal"])
        applied = {row["version"]: row for row in await conn.fetch(_Q["applied"])}
        _compare(migrations, {v: (row["name"], row["checksum_sha256"]) for v, row in applied.items()})
        for migration in migrations:
            if migration.version in applied:
                continue
            took_s = await _apply_patiently(conn, migration, now)
            _log.info("migration.applied", version=migration.version, name=migration.name, seconds=round(took_s, 1))
            done.append(migration.name)
    return done


async def standing(conn: Connection) -> tuple[int, int]:
    """At which migration the schema is, 0 where there is none, and the last one that this nexhb knows."""
    last = await conn.fetchval(_Q["last"]) if await conn.fetchval(_Q["standing"]) else None
    return last or 0, find()[-1].version


async def require(conn: Connection) -> None:
    """Raise MigrationError unless the schema is that of this nexhb. A command makes and changes none: it may have
    another database before it than the daemon, or a daemon of another version beside it."""
    applied, known = await standing(conn)
    if not applied:
        raise MigrationError(
            f"The database {await conn.fetchval(_Q['database'])} has no tables of nexhb.",
            hint="Check that database.url, or data_dir, is the daemon's; `nexhb migrate` makes the tables.",
        )
    if applied < known:
        raise MigrationError(
            f"It is at migration {applied} of {known}.", hint="Run `nexhb migrate`, or restart the daemon."
        )
    if applied > known:
        raise MigrationError(
            f"It is at migration {applied}, and this nexhb knows {known}.",
            hint="Run the nexhb that applied it, or a newer one.",
        )


async def _apply_patiently(conn: Connection, migration: Migration, now: datetime) -> float:
    """Seconds it took. A lock that somebody's old transaction withholds is asked for again and again and never waited
    for at length: every heartbeat, also those at other daemons, queues behind who waits for a table."""
    tries_left = TRIES
    while True:
        began = asyncio.get_running_loop().time()
        try:
            await _apply(conn, migration, now)
            return asyncio.get_running_loop().time() - began
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            holders = await in_the_way(conn)
            tries_left -= 1
            if not tries_left:
                raise MigrationError(
                    f"{migration.name} finds a table locked: {holders}.",
                    hint="Start again once that transaction has ended; `nexhb doctor` says how to end it.",
                ) from error
            _log.warning("migration.waits", name=migration.name, held_by=holders)
        await asyncio.sleep(PAUSE_S)


async def _apply(conn: Connection, migration: Migration, now: datetime) -> None:
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        await conn.execute(migration.text, timeout=LONGEST_S)
        await conn.execute(_Q["record"], migration.version, migration.name, migration.checksum, now)


def _compare(migrations: list[Migration], applied: dict[int, tuple[str, str]]) -> None:
    known = {m.version: m for m in migrations}
    for version, (name, checksum) in applied.items():
        migration = known.get(version)
        if migration is None:
            raise MigrationError(
                f"The database has migration {name}, which this nexhb does not know.",
                hint="Run the nexhb that applied it, or a newer one.",
            )
        if migration.checksum != checksum:
            raise MigrationError(
                f"{migration.name} was changed after it had been applied.",
                hint="Restore the file; a change of the schema is a new migration.",
            )
