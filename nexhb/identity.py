"""Which database a connection reaches, and whether it contains what was learned from the one before.

A database may be replaced while the daemon runs: by a restore, a failover to a standby that lags, a copy under its
name, a proxy that leads elsewhere. What the daemon holds in memory describes one database, up to one moment. So each
daemon adds generations to its database, and remembers the last one, in data_dir too: a database that has it contains
everything that the daemon had learned by then. Every connection is checked before it is used. A connection that reaches
another database makes everybody forget; with an older copy, tokens that it does not know are held, besides, until an
operator accepts it.
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

from nexhb import log, metrics, sql
from nexhb.db import CONNECT_TIMEOUT_S, Connection, Database, lasting
from nexhb.errors import DatabaseUnavailable
from nexhb.pgerrors import FROM_THE_DATABASE

_Q = sql.queries("identity")
_log = log.get("identity")

FILE = "database_generation.json"
EVERY_S = 300.0  # how often a generation is added
HELD_EVERY_S = 1.0  # how often a daemon looks whether an older copy was accepted
LEAST_S = 1.0  # between two generations, however often tokens change
KEPT = 50_000  # generations: half a year of one daemon
LEARNED_MOST = 10_000  # devices looked for one by one; a generation covers them a moment later


class Mark(NamedTuple):
    """A generation of a database. Two copies that go on separately have the same generations with other marks."""

    generation: int
    mark: UUID


@dataclass
class Lives:
    """What is known of the database that this daemon works with. `number` grows with each other one."""

    data_dir: Path | None = None
    number: int = 0
    missing: Mark | None = None  # the generation that this database lacks, until it is accepted
    _mark: Mark | None = None  # the last generation added here
    _oid: int | None = None
    _claimed: int | None = None  # the same of another daemon
    _learned: dict[int, str] = field(default_factory=dict)  # device_no → device_id, whose tokens came since _mark
    _changes: int = 0  # of tokens: the most that was read here
    _forgetting: list[Callable[[], object]] = field(default_factory=list)
    _floor: int = 0  # a generation that was accepted as missing: the next one exceeds it
    _due: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def older(self) -> str:
        """Why tokens that this database does not know are not answered 401; empty where they are."""
        lacks = self.missing.generation if self.missing else self._claimed
        return "" if lacks is None else f"The database is an older copy: it lacks generation {lacks}."

    def on_change(self, forget: Callable[[], object]) -> None:
        """Call `forget` as soon as a connection reaches another database, before that connection is used."""
        self._forgetting.append(forget)

    def learned(self, devices: Iterable[tuple[int, str]]) -> None:
        """Devices, by number and id, of whose tokens the daemon has learned: a generation is added at once. Until then
        a database that does not have these devices is an older copy, too. (A token may go again, a device never.)"""
        for device_no, device_id in devices:
            if len(self._learned) < LEARNED_MOST:
                self._learned[device_no] = device_id
            self._due.set()

    def counted(self, changes: int) -> None:
        """How often tokens have changed, by this database: where they have changed less often is an older copy."""
        self._changes = max(self._changes, changes)

    def unless_changed(self, number: int) -> None:
        """Raise DatabaseUnavailable where another database was found since `number`."""
        if number != self.number:
            raise DatabaseUnavailable("It was replaced by another one.")

    # ---- what a connection finds --------------------------------------------------------------------------------

    async def check(self, conn: Connection) -> None:
        """Look where a connection leads. Raises DatabaseUnavailable for a standby, and for a database without the
        tables of this version."""
        asked = None
        while asked != self._known():
            asked = self._known()
            try:
                row = await conn.fetchrow(
                    _Q["look"], *(self._mark or (None, None)), *(self.missing or (None, None)),
                    list(self._learned), list(self._learned.values()), self._changes,
                )  # fmt: skip
            except asyncpg.UndefinedTableError as error:
                raise DatabaseUnavailable("It has no tables of this version.", hint="Run nexhb migrate.") from error
            assert row is not None  # noqa: S101 - there is the current database
            if row["in_recovery"]:
                raise DatabaseUnavailable("This is a standby: it cannot commit.")
            # Where what is known has changed meanwhile, or by this, it is asked again.
            if asked == self._known():
                missed = self.missing
                self._judge(row)
                # Known before the first answer, and so to whoever starts after this daemon, too.
                if self.missing != missed:
                    await self._remember(self.missing)

    def _known(self) -> tuple[object, ...]:
        """What a connection is asked about."""
        return self.number, self._mark, self.missing, len(self._learned), self._changes

    def _judge(self, row: asyncpg.Record) -> None:
        contains = row["contains"] and row["learned"] == len(self._learned) and row["counted"]
        is_first = self._oid is None
        if not contains or row["oid"] != (self._oid or row["oid"]):
            if not contains:
                # One older copy after another: what the first lacked counts.
                self.missing, self._mark = self.missing or self._lost(row["contains"]), None
            self._learned.clear()
            self._changes = 0
            if not is_first:
                self.number += 1
            say = _log.error if not contains else _log.warning
            say("database.older" if not contains else "database.replaced", oid=row["oid"], lacks=_shown(self.missing))
            for forget in self._forgetting:
                forget()
            self._due.set()
        elif self.missing and (row["found_again"] or row["accepted"]):
            _log.warning("database.accepted", generation=self.missing.generation, again=row["found_again"])
            self._floor = self.missing.generation
            self.missing = None
            self._due.set()
        self._oid, self._claimed = row["oid"], row["missing"]
        metrics.database_older.set(1 if self.older else 0)

    @classmethod
    def remembered(cls, data_dir: Path) -> Lives:
        """Beginning with the generation that data_dir holds."""
        return cls(data_dir, _mark=read(data_dir))

    def _lost(self, contains: bool) -> Mark:
        """The generation that is missing: the last one, or the next, which would have covered what came since."""
        generation = self._mark.generation if self._mark else 0
        return self._mark if self._mark and not contains else Mark(generation + 1, uuid4())

    # ---- generations ---------------------------------------------------------------------------------------------

    async def add(self, database: Database) -> None:
        """Add a generation: everything learned so far is in a database that has it. Raises DatabaseUnavailable."""
        async with database.connected(application="nexhb generation", command_timeout_s=10) as conn:
            await self._add(conn)

    async def run(self, database: Database) -> None:
        """Add generations until cancelled. Never ends for what the database does."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HELD_EVERY_S if self.older else EVERY_S):
                    await self._due.wait()
            self._due.clear()
            try:
                await self.add(database)
            except FROM_THE_DATABASE as error:
                _log.info("database.generation_not_added", error=f"{type(error).__name__}: {error}")
                self._due.set()
                await asyncio.sleep(LEAST_S)
            await asyncio.sleep(LEAST_S)

    async def _add(self, conn: Connection) -> None:
        """A new generation, remembered once it is committed; of an older copy, what it lacks is written into it."""
        number, covered = self.number, dict(self._learned)
        if self.missing:
            await conn.execute(_Q["claim"], self.missing.mark, self.missing.generation, socket.gethostname())
            if self._mark is not None:
                return
        while (row := await conn.fetchrow(_Q["advance"], self._floor)) is None:
            pass  # another daemon added one in the same moment
        self.unless_changed(number)
        self._mark = Mark(row["generation"], row["mark"])
        self._learned = {no: name for no, name in self._learned.items() if covered.get(no) != name}
        await conn.execute(_Q["prune"], row["generation"], KEPT)
        if self.missing is None:
            await self._remember(self._mark)

    async def _remember(self, mark: Mark | None) -> None:
        if mark is not None and self.data_dir is not None:
            await asyncio.to_thread(write, self.data_dir, mark)


def _shown(mark: Mark | None) -> int | None:
    return mark.generation if mark else None


@dataclass(frozen=True)
class Watched(Database):
    """A database of which every new connection is checked."""

    lives: Lives = field(default_factory=Lives, compare=False, repr=False)

    @classmethod
    def of(cls, database: Database, lives: Lives) -> Watched:
        """The same database, checked by `lives`."""
        return cls(**{one.name: getattr(database, one.name) for one in fields(database)}, lives=lives)

    async def _settle(self, conn: Connection, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        await super()._settle(conn, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self.lives.check(conn)
        except BaseException as error:
            conn.terminate()
            if isinstance(error, FROM_THE_DATABASE) and not isinstance(error, DatabaseUnavailable):
                raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
            raise


# ---- the operator's side ----------------------------------------------------------------------------------------


class Missing(NamedTuple):
    """A generation that a daemon remembers and the database lacks."""

    generation: int
    host: str


async def missing(conn: Connection, data_dir: Path) -> list[Missing]:
    """What the database lacks and nobody has accepted, by what daemons wrote into it and by this data_dir."""
    found = [Missing(row["generation"], row["host"]) for row in await conn.fetch(_Q["missing"])]
    own = await asyncio.to_thread(read, data_dir)
    if own is not None:
        row = await conn.fetchrow(_Q["look"], *own, *own, [], [], 0)
        if row is not None and not row["contains"] and not row["accepted"] and not found:
            found.append(Missing(own.generation, socket.gethostname()))
    return found


async def accept(conn: Connection, data_dir: Path) -> list[Missing]:
    """Go on with this database as it is, for every daemon: what was accepted."""
    async with lasting(conn):
        own = await asyncio.to_thread(read, data_dir)
        if own is not None:
            row = await conn.fetchrow(_Q["look"], *own, *own, [], [], 0)
            if row is not None and not row["contains"]:
                await conn.execute(_Q["claim"], own.mark, own.generation, socket.gethostname())
        return [Missing(row["generation"], row["host"]) for row in await conn.fetch(_Q["accept"])]


# ---- data_dir ---------------------------------------------------------------------------------------------------


class _Kept(msgspec.Struct):
    generation: int
    mark: UUID


def read(data_dir: Path) -> Mark | None:
    """The last generation that a daemon with this data_dir has added; None where there is none that can be read."""
    path = data_dir / FILE
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError) as error:
        _log.error("database.generation_not_read", path=str(path), error=str(error))
        return None
    return Mark(kept.generation, kept.mark)


def write(data_dir: Path, mark: Mark) -> None:
    """Remember a generation, such that a crash leaves the one before or this one."""
    path = data_dir / FILE
    beside = data_dir / f".{FILE}.{os.getpid()}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(_Kept(mark.generation, mark.mark)))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(data_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _log.error("database.generation_not_kept", path=str(path), error=str(error))
