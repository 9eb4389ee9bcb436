"""Bring the schema up to date with numbered SQL files, each in one transaction, under an advisory lock."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import asyncpg

from nexhb import log
from nexhb.errors import MigrationError
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, check_version
from nexhb.postgres.locks import Lock, blocking_transactions, held

_Q = sql.queries("migrate")
_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_log = log.get("migrate")

ATTEMPTS, PAUSE_S = 10, 5.0  # ten attempts, five seconds apart: about a minute in total
LOCK_TIMEOUT_MS = 1_000  # heartbeats queue behind a waiting lock, and a device gets its response within 10 s
# Enough to rewrite the last status of ten million devices; the connection's own timeout is meant for queries.
MAX_DURATION_S = 600.0


@dataclass(frozen=True)
class Migration:
    """One migration file."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """The SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_migrations(folder: Path | None = None) -> list[Migration]:
    """Return the migrations in order. Raises MigrationError for a missing number or a wrong file name."""
    folder = folder or sql.root() / "migrations"
    migrations: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if not match or int(match[1]) != len(migrations) + 1:
            raise MigrationError(
                f"{path.name}: migrations are named 0001_name.sql, 0002_name.sql and so on, without gaps."
            )
        migrations.append(Migration(int(match[1]), path.stem, path.read_text(encoding="utf-8")))
    return migrations


async def migrate(conn: Connection, now: datetime, migrations: list[Migration] | None = None) -> list[str]:
    """Apply the missing migrations and return their names. `conn` must not belong to a pool.

    Raises MigrationError if an applied file was changed or is missing, or if the database is newer than this nexhb.
    """
    await check_version(conn)
    migrations = find_migrations() if migrations is None else migrations
    done: list[str] = []
    async with held(conn, Lock.MIGRATE, wait=True):
        await conn.execute(_Q["journal"])
        applied = {row["version"]: row for row in await conn.fetch(_Q["applied"])}
        _check_applied(migrations, {v: (row["name"], row["checksum_sha256"]) for v, row in applied.items()})
        for migration in migrations:
            if migration.version in applied:
                continue
            took_s = await _apply_with_retry(conn, migration, now)
            _log.info("migration.applied", version=migration.version, name=migration.name, seconds=round(took_s, 1))
            done.append(migration.name)
    return done


async def schema_versions(conn: Connection) -> tuple[int, int]:
    """Return the last applied migration, 0 if there is none, and the last one that this nexhb knows."""
    last = await conn.fetchval(_Q["last"]) if await conn.fetchval(_Q["journal_exists"]) else None
    return last or 0, find_migrations()[-1].version


async def require_current_schema(conn: Connection) -> None:
    """Raise MigrationError unless the schema is that of this nexhb.

    Commands call this instead of migrating: they may be connected to another database than the daemon, or run beside a
    daemon of another version.
    """
    applied, known = await schema_versions(conn)
    if not applied:
        raise MigrationError(
            f"The database {await conn.fetchval(_Q['database'])} has no tables of nexhb.",
            hint="Check that database.url, or data_dir, is the daemon's; `nexhb migrate` creates the tables.",
        )
    if applied < known:
        raise MigrationError(
            f"The database is at migration {applied} of {known}.", hint="Run `nexhb migrate`, or restart the daemon."
        )
    if applied > known:
        raise MigrationError(
            f"The database is at migration {applied}, but this nexhb knows only {known}.",
            hint="Run the nexhb that applied it, or a newer version.",
        )


async def _apply_with_retry(conn: Connection, migration: Migration, now: datetime) -> float:
    """Apply one migration and return its duration in seconds.

    If a long transaction has locked a table, the migration is tried again and again, each time with a short lock
    timeout: while a lock request waits, every heartbeat of every daemon queues behind it.
    """
    attempts_left = ATTEMPTS
    while True:
        began = asyncio.get_running_loop().time()
        try:
            await _apply(conn, migration, now)
            return asyncio.get_running_loop().time() - began
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            holders = await blocking_transactions(conn)
            attempts_left -= 1
            if not attempts_left:
                raise MigrationError(
                    f"{migration.name} could not lock a table: {holders}.",
                    hint="Start nexhb again once that transaction has ended; `nexhb doctor` shows how to end it.",
                ) from error
            _log.warning("migration.waits", name=migration.name, held_by=holders)
        await asyncio.sleep(PAUSE_S)


async def _apply(conn: Connection, migration: Migration, now: datetime) -> None:
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        await conn.execute(migration.text, timeout=MAX_DURATION_S)
        await conn.execute(_Q["record"], migration.version, migration.name, migration.checksum, now)


def _check_applied(migrations: list[Migration], applied: dict[int, tuple[str, str]]) -> None:
    known = {m.version: m for m in migrations}
    for version, (name, checksum) in applied.items():
        migration = known.get(version)
        if migration is None:
            raise MigrationError(
                f"The database has migration {name}, which this nexhb does not know.",
                hint="Run the nexhb that applied it, or a newer version.",
            )
        if migration.checksum != checksum:
            raise MigrationError(
                f"{migration.name} was changed after it had been applied.",
                hint="Restore the file. A change of the schema needs a new migration.",
            )
