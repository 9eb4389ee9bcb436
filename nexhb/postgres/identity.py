"""Tell which database a connection reaches, and whether that database contains what the daemon has already learned.

A database may be replaced while the daemon runs: by a restore, a failover to a lagging standby, a copy under the same
name, or a proxy that leads elsewhere. What the daemon holds in memory describes one database up to one moment. So each
daemon adds generations to its database and remembers the last one, in memory and in data_dir: a database that has that
generation contains everything that the daemon had learned by then. Every connection is checked before it is used. When
a connection reaches another database, all in-memory state is dropped. If that database is an older copy, requests with
tokens that it does not know also receive 503 until an operator accepts the copy.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple
from uuid import UUID, uuid4

import asyncpg
import msgspec

from nexhb import log, metrics
from nexhb.errors import DatabaseUnavailable, described
from nexhb.postgres import sql
from nexhb.postgres.connections import CONNECT_TIMEOUT_S, Connection, Database, lasting
from nexhb.postgres.errors import FROM_THE_DATABASE

_Q = sql.queries("identity")
_log = log.get("identity")

FILE = "database_generation.json"
GENERATION_INTERVAL_S = 300.0
ACCEPTANCE_POLL_S = 1.0  # how often a daemon checks whether an older copy was accepted
MIN_INTERVAL_S = 1.0  # the minimum between two generations, however often tokens change
MAX_GENERATIONS = 50_000  # number of generations that are kept: one daemon adds as many in half a year
MAX_NEW_DEVICES = 10_000  # number of devices that are looked up one by one until the next generation covers them


class Mark(NamedTuple):
    """A generation of a database. If two copies of a database diverge, they share generation numbers but not marks."""

    generation: int
    mark: UUID


@dataclass
class DatabaseTracker:
    """What is known of the database that this daemon works with. `epoch` grows with each replacement."""

    data_dir: Path | None = None
    epoch: int = 0
    missing: Mark | None = None  # the generation that this database lacks, until an operator accepts the loss
    _mark: Mark | None = None  # the last generation that this daemon added
    _oid: int | None = None
    _missing_elsewhere: int | None = None  # a generation that another daemon added and this database lacks
    _new_devices: dict[int, str] = field(default_factory=dict)  # device_no → device_id, with tokens learned since _mark
    _changes: int = 0  # the highest count of token changes read from this database
    _callbacks: list[Callable[[], object]] = field(default_factory=list)
    _min_generation: int = 0  # the last generation accepted as missing: the next generation must be greater
    _due: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def older_copy(self) -> str:
        """Why a token that this database does not know receives 503 and not 401; empty unless the database is an older
        copy.
        """
        lacks = self.missing.generation if self.missing else self._missing_elsewhere
        return "" if lacks is None else f"The database is an older copy: it lacks generation {lacks}."

    def on_change(self, callback: Callable[[], object]) -> None:
        """Call `callback` as soon as a connection reaches another database, before that connection is used."""
        self._callbacks.append(callback)

    def note_devices(self, devices: Iterable[tuple[int, str]]) -> None:
        """Remember devices, as (device_no, device_id), whose tokens the daemon has just learned. A generation is added
        at once; until then a database without these devices counts as an older copy. (Tokens may be deleted, devices
        never are.)"""
        for device_no, device_id in devices:
            if len(self._new_devices) < MAX_NEW_DEVICES:
                self._new_devices[device_no] = device_id
            self._due.set()

    def note_changes(self, changes: int) -> None:
        """Remember this database's count of token changes: a database with a lower count is an older copy."""
        self._changes = max(self._changes, changes)

    def require_epoch(self, epoch: int) -> None:
        """Raise DatabaseUnavailable if the database was replaced since `epoch`."""
        if epoch != self.epoch:
            raise DatabaseUnavailable("It was replaced by another one.")

    # ---- checking a connection ----------------------------------------------------------------------------------

    async def check(self, conn: Connection) -> None:
        """Compare the database of `conn` with the one that this daemon knows. Raise DatabaseUnavailable for a
        standby, and for a database without the tables of this version."""
        checked = None
        while checked != self._known():
            checked = self._known()
            try:
                row = await conn.fetchrow(
                    _Q["look"], *(self._mark or (None, None)), *(self.missing or (None, None)),
                    list(self._new_devices), list(self._new_devices.values()), self._changes,
                )  # fmt: skip
            except asyncpg.UndefinedTableError as error:
                raise DatabaseUnavailable("It has no tables of this version.", hint="Run nexhb migrate.") from error
            assert row is not None  # noqa: S101 - the current database always has its row
            if row["in_recovery"]:
                raise DatabaseUnavailable("This is a standby: it cannot commit.")
            # If the known identity has changed during the query, or because of its result, the check is repeated.
            if checked == self._known():
                missed = self.missing
                self._evaluate(row)
                # The loss is stored before the first request is answered, so that the next daemon to start knows of it,
                # too.
                if self.missing != missed:
                    await self._remember(self.missing)

    def _known(self) -> tuple[object, ...]:
        """Return everything that a check compares with the database."""
        return self.epoch, self._mark, self.missing, len(self._new_devices), self._changes

    def _evaluate(self, row: asyncpg.Record) -> None:
        contains = row["contains"] and row["learned"] == len(self._new_devices) and row["counted"]
        is_first = self._oid is None
        if not contains or row["oid"] != (self._oid or row["oid"]):
            if not contains:
                # If an older copy is replaced by another older copy, the generation that the first copy lacked still
                # counts as missing.
                self.missing, self._mark = self.missing or self._lost(row["contains"]), None
            self._new_devices.clear()
            self._changes = 0
            if not is_first:
                self.epoch += 1
            log_event = _log.error if not contains else _log.warning
            event = "database.older" if not contains else "database.replaced"
            log_event(event, oid=row["oid"], lacks=self.missing.generation if self.missing else None)
            for callback in self._callbacks:
                callback()
            self._due.set()
        elif self.missing and (row["found_again"] or row["accepted"]):
            _log.warning("database.accepted", generation=self.missing.generation, again=row["found_again"])
            self._min_generation = self.missing.generation
            self.missing = None
            self._due.set()
        self._oid, self._missing_elsewhere = row["oid"], row["missing"]
        metrics.database_older.set(1 if self.older_copy else 0)

    @classmethod
    def load(cls, data_dir: Path) -> DatabaseTracker:
        """Return a tracker that starts from the generation stored in data_dir."""
        return cls(data_dir, _mark=read(data_dir))

    def _lost(self, contains: bool) -> Mark:
        """Return the generation that the database lacks. That is the last generation that this daemon added or, if the
        database has it, the next generation, which would have covered what the daemon has learned since.
        """
        generation = self._mark.generation if self._mark else 0
        return self._mark if self._mark and not contains else Mark(generation + 1, uuid4())

    # ---- generations ---------------------------------------------------------------------------------------------

    async def add(self, database: Database) -> None:
        """Add a generation, which covers everything learned so far. Raise DatabaseUnavailable."""
        async with database.connected(application="nexhb generation", command_timeout_s=10) as conn:
            await self._add(conn)

    async def run(self, database: Database) -> None:
        """Add generations until cancelled. An error of the database never ends this task."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ACCEPTANCE_POLL_S if self.older_copy else GENERATION_INTERVAL_S):
                    await self._due.wait()
            self._due.clear()
            try:
                await self.add(database)
            except FROM_THE_DATABASE as error:
                _log.info("database.generation_not_added", error=described(error))
                self._due.set()
                await asyncio.sleep(MIN_INTERVAL_S)
            await asyncio.sleep(MIN_INTERVAL_S)

    async def _add(self, conn: Connection) -> None:
        """Commit a new generation, then remember it. In an older copy, record which generation it lacks."""
        epoch, covered = self.epoch, dict(self._new_devices)
        if self.missing:
            await conn.execute(_Q["claim"], self.missing.mark, self.missing.generation, socket.gethostname())
            if self._mark is not None:
                return
        while (row := await conn.fetchrow(_Q["advance"], self._min_generation)) is None:
            pass  # another daemon added a generation with the same number at the same moment
        self.require_epoch(epoch)
        self._mark = Mark(row["generation"], row["mark"])
        self._new_devices = {no: name for no, name in self._new_devices.items() if covered.get(no) != name}
        await conn.execute(_Q["prune"], row["generation"], MAX_GENERATIONS)
        if self.missing is None:
            await self._remember(self._mark)

    async def _remember(self, mark: Mark | None) -> None:
        if mark is not None and self.data_dir is not None:
            await asyncio.to_thread(write, self.data_dir, mark)


@dataclass(frozen=True)
class CheckedDatabase(Database):
    """A database whose every new connection is checked."""

    tracker: DatabaseTracker = field(default_factory=DatabaseTracker, compare=False, repr=False)

    @classmethod
    def wrap(cls, database: Database, tracker: DatabaseTracker) -> CheckedDatabase:
        """Return the same database, with new connections checked by `tracker`."""
        return cls(**{item.name: getattr(database, item.name) for item in fields(database)}, tracker=tracker)

    async def _configure(self, conn: Connection, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        await super()._configure(conn, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self.tracker.check(conn)
        except BaseException as error:
            conn.terminate()
            if isinstance(error, FROM_THE_DATABASE) and not isinstance(error, DatabaseUnavailable):
                raise DatabaseUnavailable(described(error)) from error
            raise


# ---- for operators ----------------------------------------------------------------------------------------------


class Missing(NamedTuple):
    """A generation that a daemon remembers and the database lacks."""

    generation: int
    host: str


async def missing(conn: Connection, data_dir: Path) -> list[Missing]:
    """Return the generations that the database lacks and no operator has accepted, as daemons recorded them in the
    database and as this data_dir remembers."""
    generations = [Missing(row["generation"], row["host"]) for row in await conn.fetch(_Q["missing"])]
    own = await asyncio.to_thread(read, data_dir)
    if own is not None:
        row = await conn.fetchrow(_Q["look"], *own, *own, [], [], 0)
        if row is not None and not row["contains"] and not row["accepted"] and not generations:
            generations.append(Missing(own.generation, socket.gethostname()))
    return generations


async def accept(conn: Connection, data_dir: Path) -> list[Missing]:
    """Accept this database as it is, for every daemon; return the missing generations that were accepted."""
    async with lasting(conn):
        own = await asyncio.to_thread(read, data_dir)
        if own is not None:
            row = await conn.fetchrow(_Q["look"], *own, *own, [], [], 0)
            if row is not None and not row["contains"]:
                await conn.execute(_Q["claim"], own.mark, own.generation, socket.gethostname())
        return [Missing(row["generation"], row["host"]) for row in await conn.fetch(_Q["accept"])]


# ---- data_dir ---------------------------------------------------------------------------------------------------


class _StoredMark(msgspec.Struct):
    generation: int
    mark: UUID


def read(data_dir: Path) -> Mark | None:
    """Return the last generation that a daemon with this data_dir has added, or None if none can be read."""
    path = data_dir / FILE
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_StoredMark)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError) as error:
        _log.error("database.generation_not_read", path=str(path), error=str(error))
        return None
    return Mark(stored.generation, stored.mark)


def write(data_dir: Path, mark: Mark) -> None:
    """Store a generation atomically: after a crash, the file contains either the previous generation or this one."""
    path = data_dir / FILE
    temporary = data_dir / f".{FILE}.{os.getpid()}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(_StoredMark(mark.generation, mark.mark)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(data_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _log.error("database.generation_not_kept", path=str(path), error=str(error))
