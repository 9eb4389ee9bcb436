"""Connections: how they are made, what they are set to, and whether the database can be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any

import asyncpg

from nexhb import dburl, pgfiles, pgreach, session, sql, supported
from nexhb.errors import ConfigError, DatabaseUnavailable, DatabaseUnfit, NotConfirmed, PoolerBetween
from nexhb.pgerrors import FROM_THE_DATABASE, Kind, classify
from nexhb.wire import pack_moment, unpack_moment

supported.check("asyncpg", asyncpg.__version__)

_Q = sql.queries("db")

MINIMUM_VERSION = 140000
CONNECT_TIMEOUT_S = 10.0
# What we prepare meets what another one prepared, or is not there: a pooler shares the session.
SHARED_SESSION = (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError)

Connection = asyncpg.Connection
Pool = asyncpg.Pool


@dataclass(frozen=True)
class Database:
    """How to reach it."""

    dsn: str = field(repr=False)
    home: session.Home = field(default_factory=session.Home, compare=False, repr=False)
    name: str = "database.url"  # what its address is called in messages

    @cached_property
    def address(self) -> dburl.Address:
        """The parts of the address. Raises ConfigError where it is none."""
        try:
            return dburl.parse(self.dsn)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}.") from None

    def _how(self) -> dict[str, Any]:
        """What asyncpg is given: it takes some parts of an address otherwise than libpq does."""
        address = self.address
        found: dict[str, Any] = {"dsn": self.dsn, "password": address.password or partial(pgfiles.password, address)}
        if address.hosts:
            if address.is_local:
                found |= {"ssl": False, "direct_tls": False}  # as libpq: PGSSLMODE is for TCP
            found |= {"host": [host for host, _ in address.hosts], "port": [port for _, port in address.hosts]}
        return found | {key: value for key in ("user", "database") if (value := getattr(address, key))}

    async def connect(
        self,
        *,
        application: str,
        command_timeout_s: float = 60.0,
        timeout_s: float = CONNECT_TIMEOUT_S,
        **settings: str | None,
    ) -> Connection:
        """A connection of one's own. Raises DatabaseUnavailable where there is none to be had, ConfigError where the
        address is none."""
        pgfiles.check(self.address, self.name)
        try:
            conn: Connection = await asyncpg.connect(
                **self._how(),
                connection_class=_Session,
                timeout=timeout_s,
                command_timeout=command_timeout_s,
                server_settings=session.at_start(application, settings),
            )
        except (asyncpg.ClientConfigurationError, UnicodeError):  # what is left; the text may repeat a password
            raise ConfigError(f"{self.name}: {self.address.where}: takes {dburl.FORM}.") from None
        except asyncpg.ProtocolViolationError as error:
            if "startup parameter" not in str(error):  # pgbouncer's, for each that ignore_startup_parameters lacks
                raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
            raise PoolerBetween(f"It said: {error}.") from error
        except Exception as error:
            if _is_foreseen(error):
                raise pgreach.explained(error, self.address, self.name) from error
            raise
        _end_copies_with(conn)
        await self._settle(conn, timeout_s)
        return conn

    async def _settle(self, conn: Connection, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Make a new session ours, or end it. Raises DatabaseUnfit, PoolerBetween, DatabaseUnavailable."""
        try:
            async with asyncio.timeout(timeout_s):
                await session.settle(conn, self.home)
        except BaseException as error:
            conn.terminate()
            if isinstance(error, SHARED_SESSION):
                raise PoolerBetween from error
            if _is_foreseen(error) and not isinstance(error, DatabaseUnavailable):
                raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
            raise

    @asynccontextmanager
    async def connected(self, *, application: str, **how: Any) -> AsyncIterator[Connection]:
        """The same for a block, and closed behind it."""
        conn = await self.connect(application=application, **how)
        try:
            yield conn
        finally:
            try:
                await conn.close(timeout=5)
            except FROM_THE_DATABASE:
                conn.terminate()

    async def pool(self, *, application: str, size: int, timeout_s: float, **settings: str) -> Pool:
        """A bounded pool; each statement ends after `timeout_s`, on the server too."""
        return await asyncpg.create_pool(
            **self._how(),
            connection_class=_Session,
            min_size=0,  # a floor would be kept up by a task that fills the log while the database is away
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=timeout_s + 1,
            init=self._prepare_reader,
            reset=_as_it_is,
            server_settings=session.at_start(
                application, settings | {"statement_timeout": f"{round(timeout_s * 1000)}"}
            ),
        )

    async def _prepare_reader(self, conn: Connection) -> None:
        await self._settle(conn)
        await _use_text(conn)


@asynccontextmanager
async def lasting(conn: Connection) -> AsyncIterator[None]:
    """A transaction which, once the block has ended, is as durable as synchronous_commit promises.

    A wait for a synchronous standby that is cancelled ends in success with a WARNING. A later transaction that the
    standby confirms proves the earlier ones. Raises NotConfirmed.
    """
    warnings: list[str] = []

    def note(_conn: object, message: asyncpg.PostgresLogMessage) -> None:
        if getattr(message, "severity_en", None) == "WARNING":
            warnings.append(getattr(message, "message", ""))

    conn.add_log_listener(note)
    try:
        async with conn.transaction():
            yield
        if warnings:
            warnings.clear()
            await conn.execute(_Q["write_after"])
    finally:
        conn.remove_log_listener(note)
    if warnings:
        raise NotConfirmed(f"{warnings[0]}.", hint="Repeat it once the standby is there.")


class _Session(asyncpg.Connection):
    """A connection that may be terminated by another coroutine than the one that uses it."""

    def _abort(self) -> None:
        """asyncpg 0.32 lets go of its protocol here: what is between two of a statement's steps would fail with an
        AttributeError, in place of an InterfaceError."""
        protocol: Any = self._protocol  # type: ignore[has-type]
        super()._abort()  # type: ignore[misc]
        self._protocol = protocol


def _is_foreseen(error: BaseException) -> bool:
    """Whether it says of the database that it cannot be had now."""
    return isinstance(error, asyncpg.PostgresError) or classify(error) is not Kind.BUG


def _end_copies_with(conn: Any) -> None:
    """A COPY that waits for room in the socket of a lost connection goes on, and finds that out: asyncpg 0.32 would
    wait for ever, the statement's timeout notwithstanding."""
    protocol = conn._protocol  # when the listener is called, the connection may have let go of it
    conn.add_termination_listener(lambda _: protocol.resume_writing())


async def use_packed(conn: Connection) -> None:
    """Let this connection take inet and timestamptz values as PostgreSQL's own bytes too: asyncpg would parse each
    address again (2 µs), and take 0.5 µs for each moment, of which a heartbeat has four."""
    await conn.set_type_codec("inet", schema="pg_catalog", encoder=_same, decoder=_same, format="binary")
    await conn.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=_moment, decoder=unpack_moment, format="binary"
    )


async def _as_it_is(_conn: Connection) -> None:
    """A read leaves nothing behind but a transaction that was cut off, which asyncpg ends before this: to have the
    session reset besides costs each read a message to PostgreSQL and back."""


async def _use_text(conn: Connection) -> None:
    """Let who reads take addresses and moments as PostgreSQL writes them. An address stays as it is: parsed and written
    again, a thousand of them took 1.1 ms. A moment is read by Python's own C in a third of asyncpg's 1.9 µs.
    """
    await conn.set_type_codec("inet", schema="pg_catalog", encoder=_same, decoder=_same, format="text")
    await conn.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=datetime.isoformat, decoder=datetime.fromisoformat, format="text"
    )


def _same(value: Any) -> Any:
    return value


def _moment(value: bytes | datetime) -> bytes:
    return value if value.__class__ is bytes else pack_moment(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Finding:
    """Something about the database that stands against a promise, and what to do."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})"


# pgbouncer and its like, in any mode: what a connection asks for at its start does not reach PostgreSQL.
POOLER = Finding("a pooler keeps our session's settings to itself", "connect directly")


async def unsafe_settings(conn: Connection) -> list[Finding]:
    """What stands against the promise that an acknowledged heartbeat survives a crash; empty where nothing does."""
    try:
        row = await conn.fetchrow(_Q["settings"])
    except SHARED_SESSION:
        return [POOLER]
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    found = [
        Finding(f"{name} is off", f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()")
        for name in ("fsync", "full_page_writes")
        if row[name] != "on"
    ]
    if row["session_mark"] != session.MARK:
        found.append(POOLER)
    elif row["timezone"] != "UTC" or row["synchronous_commit"] not in ("on", "remote_apply"):
        found.append(
            Finding(
                f"TimeZone is {row['timezone']}, synchronous_commit {row['synchronous_commit']}, against our wish",
                "remove what overrides them: ALTER ROLE or ALTER DATABASE … SET, or an extension",
            )
        )
    if row["in_recovery"]:
        found.append(Finding("this is a standby: it cannot commit", "point database.url at the primary"))
    return found


async def check_version(conn: Connection) -> None:
    """Raise DatabaseUnavailable where PostgreSQL is older than 14."""
    row = await conn.fetchrow(_Q["settings"])
    assert row is not None  # noqa: S101 - see above
    if row["version_num"] < MINIMUM_VERSION:
        raise DatabaseUnavailable(f"It is PostgreSQL {row['version']}.", hint="nexhb needs 14 or newer.")


async def check_tables(conn: Connection) -> None:
    """Raise DatabaseUnfit where a table of nexhb's is not there: dropped, renamed, or not restored."""
    if missing := [row["relation"] for row in await conn.fetch(_Q["missing_tables"])]:
        raise DatabaseUnfit(
            f"Tables of nexhb are missing: {', '.join(missing)}.",
            reason=f"tables of nexhb are missing: {', '.join(missing)}",
            hint="Rename them back, or restore a backup: docs/runbook.md#backup-and-restore.",
        )
