"""Connections to PostgreSQL: how they are opened and configured, and whether the database keeps what it commits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from nexhb import supported
from nexhb.config import database_url, libpq_files
from nexhb.errors import ConfigError, DatabaseUnavailable, DatabaseUnfit, NotConfirmed, PoolerBetween, described
from nexhb.postgres import reachability, session, sql
from nexhb.postgres.codecs import pack_moment, unpack_moment
from nexhb.postgres.errors import FROM_THE_DATABASE, Kind, classify

supported.check("asyncpg", asyncpg.__version__)

_Q = sql.queries("connections")

MINIMUM_VERSION = 140000
CONNECT_TIMEOUT_S = 10.0
# A prepared statement of nexhb already exists, or no longer exists: a connection pooler shares the session with others.
SHARED_SESSION = (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError)

Connection = asyncpg.Connection
Pool = asyncpg.Pool
AnyConnection = Connection | PoolConnectionProxy


@dataclass(frozen=True)
class Database:
    """The address of a database, and the schema of the tables there."""

    dsn: str = field(repr=False)
    schema: session.TableSchema = field(default_factory=session.TableSchema, compare=False, repr=False)
    name: str = "database.url"  # the setting that holds the address, for messages

    @cached_property
    def address(self) -> database_url.Address:
        """Return the parts of the address. Raises ConfigError if it is not valid."""
        try:
            return database_url.parse(self.dsn)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}.") from None

    def _connect_args(self) -> dict[str, Any]:
        """Return asyncpg's arguments. asyncpg interprets some parts of an address differently from libpq."""
        address = self.address
        args: dict[str, Any] = {"dsn": self.dsn, "password": address.password or partial(libpq_files.password, address)}
        if address.hosts:
            if address.is_local:
                args |= {"ssl": False, "direct_tls": False}  # as in libpq, PGSSLMODE applies to TCP only
            args |= {"host": [host for host, _ in address.hosts], "port": [port for _, port in address.hosts]}
        return args | {key: value for key in ("user", "database") if (value := getattr(address, key))}

    async def connect(
        self,
        *,
        application: str,
        command_timeout_s: float = 60.0,
        timeout_s: float = CONNECT_TIMEOUT_S,
        **settings: str | None,
    ) -> Connection:
        """Open a connection. Raises DatabaseUnavailable if that fails, ConfigError if the address is not valid."""
        libpq_files.check(self.address, self.name)
        try:
            conn: Connection = await asyncpg.connect(
                **self._connect_args(),
                connection_class=_Session,
                timeout=timeout_s,
                command_timeout=command_timeout_s,
                server_settings=session.at_start(application, settings),
            )
        except (
            asyncpg.ClientConfigurationError,
            UnicodeError,
        ):  # the text of any other error in the address may repeat the password
            raise ConfigError(f"{self.name}: {self.address.where}: expected {database_url.FORM}.") from None
        except asyncpg.ProtocolViolationError as error:
            if "startup parameter" not in str(error):  # in pgbouncer's error about an unsupported parameter
                raise DatabaseUnavailable(described(error)) from error
            raise PoolerBetween(f"Its error: {error}.") from error
        except Exception as error:
            if _is_expected(error):
                raise reachability.explain(error, self.address, self.name) from error
            raise
        _end_copies_with(conn)
        await self._configure(conn, timeout_s)
        return conn

    async def _configure(self, conn: Connection, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Configure a new session, or end it. Raises DatabaseUnfit, PoolerBetween, DatabaseUnavailable."""
        try:
            async with asyncio.timeout(timeout_s):
                await session.configure(conn, self.schema)
        except BaseException as error:
            conn.terminate()
            if isinstance(error, SHARED_SESSION):
                raise PoolerBetween from error
            if _is_expected(error) and not isinstance(error, DatabaseUnavailable):
                raise DatabaseUnavailable(described(error)) from error
            raise

    @asynccontextmanager
    async def connected(self, *, application: str, **options: Any) -> AsyncIterator[Connection]:
        """Open a connection for the block, and close it afterwards. `options` are those of `connect`."""
        conn = await self.connect(application=application, **options)
        try:
            yield conn
        finally:
            try:
                await conn.close(timeout=5)
            except FROM_THE_DATABASE:
                conn.terminate()

    async def pool(self, *, application: str, size: int, timeout_s: float, **settings: str) -> Pool:
        """Return a pool of at most `size` connections. A statement is cancelled after `timeout_s`, on the server
        too."""
        return await asyncpg.create_pool(
            **self._connect_args(),
            connection_class=_Session,
            min_size=0,  # with a minimum, a task would keep reconnecting, and fill the log while the database is down
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=timeout_s + 1,
            init=self._prepare_reader,
            reset=_skip_reset,
            server_settings=session.at_start(
                application, settings | {"statement_timeout": f"{round(timeout_s * 1000)}"}
            ),
        )

    async def _prepare_reader(self, conn: Connection) -> None:
        await self._configure(conn)
        await _use_text(conn)


@asynccontextmanager
async def lasting(conn: Connection) -> AsyncIterator[None]:
    """Run the block in a transaction that is as durable on exit as synchronous_commit promises.

    If the wait for a synchronous standby is cancelled, COMMIT succeeds with a WARNING. A later transaction that the
    standby confirms proves that the standby has the earlier ones. Raises NotConfirmed.
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
        raise NotConfirmed(f"{warnings[0]}.", hint="Repeat the change once the standby is connected.")


class _Session(asyncpg.Connection):
    """A connection that another coroutine may terminate while it is in use."""

    def _abort(self) -> None:
        """Keep asyncpg's protocol object, which asyncpg 0.32 drops here: a coroutine between two steps of a statement
        would fail with an AttributeError instead of an InterfaceError."""
        protocol: Any = self._protocol  # type: ignore[has-type]
        super()._abort()  # type: ignore[misc]
        self._protocol = protocol


def _is_expected(error: BaseException) -> bool:
    """Return whether the error means that the database is unavailable; any other error is a bug."""
    return isinstance(error, asyncpg.PostgresError) or classify(error) is not Kind.BUG


def _end_copies_with(conn: Any) -> None:
    """Wake a COPY that waits for space in the socket buffer when its connection is lost, so that it fails: asyncpg 0.32
    would wait forever, in spite of the statement's timeout."""
    protocol = conn._protocol  # when the listener runs, the connection may have dropped the object
    conn.add_termination_listener(lambda _: protocol.resume_writing())


async def use_packed(conn: Connection) -> None:
    """Let this connection also accept inet and timestamptz values in PostgreSQL's binary format. asyncpg would parse
    each address again (2 µs), and needs 0.5 µs for each timestamp, of which a heartbeat has four."""
    await conn.set_type_codec("inet", schema="pg_catalog", encoder=_unchanged, decoder=_unchanged, format="binary")
    await conn.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=_encode_moment, decoder=unpack_moment, format="binary"
    )


async def _skip_reset(_conn: Connection) -> None:
    """Do not reset the session: a read leaves at most an aborted transaction, which asyncpg has already rolled back. A
    reset would cost each read another round trip to PostgreSQL."""


async def _use_text(conn: Connection) -> None:
    """Read addresses and timestamps in PostgreSQL's text format. An address stays text: parsing and formatting a
    thousand of them took 1.1 ms. Python's C code parses a timestamp in a third of asyncpg's 1.9 µs.
    """
    await conn.set_type_codec("inet", schema="pg_catalog", encoder=_unchanged, decoder=_unchanged, format="text")
    await conn.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=datetime.isoformat, decoder=datetime.fromisoformat, format="text"
    )


def _unchanged(value: Any) -> Any:
    return value


def _encode_moment(value: bytes | datetime) -> bytes:
    return value if value.__class__ is bytes else pack_moment(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Hazard:
    """A state of the database or its disk that endangers acknowledged heartbeats, and the remedy."""

    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.detail} ({self.remedy})"


# pgbouncer and similar poolers, in any mode, do not forward a connection's startup parameters to PostgreSQL.
POOLER = Hazard("a connection pooler drops the session's settings", "connect directly")


async def unsafe_settings(conn: Connection) -> list[Hazard]:
    """Return what endangers an acknowledged heartbeat in a crash; empty if nothing does."""
    try:
        row = await conn.fetchrow(_Q["settings"])
    except SHARED_SESSION:
        return [POOLER]
    assert row is not None  # noqa: S101 - a SELECT without FROM has one row
    hazards = [
        Hazard(f"{name} is off", f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()")
        for name in ("fsync", "full_page_writes")
        if row[name] != "on"
    ]
    if row["session_mark"] != session.MARK:
        hazards.append(POOLER)
    elif row["timezone"] != "UTC" or row["synchronous_commit"] not in ("on", "remote_apply"):
        hazards.append(
            Hazard(
                f"TimeZone is {row['timezone']}, synchronous_commit {row['synchronous_commit']}, unlike nexhb set them",
                "remove what overrides them: ALTER ROLE or ALTER DATABASE … SET, or an extension",
            )
        )
    if row["in_recovery"]:
        hazards.append(Hazard("this server is a standby, which cannot commit", "point database.url at the primary"))
    return hazards


async def check_version(conn: Connection) -> None:
    """Raise DatabaseUnavailable if PostgreSQL is older than 14."""
    row = await conn.fetchrow(_Q["settings"])
    assert row is not None  # noqa: S101 - see above
    if row["version_num"] < MINIMUM_VERSION:
        raise DatabaseUnavailable(
            f"The server is PostgreSQL {row['version']}.", hint="nexhb needs version 14 or newer."
        )


async def check_tables(conn: Connection) -> None:
    """Raise DatabaseUnfit if a table of nexhb is missing: dropped, renamed, or not restored."""
    if missing := [row["relation"] for row in await conn.fetch(_Q["missing_tables"])]:
        raise DatabaseUnfit(
            f"Tables of nexhb are missing: {', '.join(missing)}.",
            reason=f"tables of nexhb are missing: {', '.join(missing)}",
            hint="Rename them back, or restore a backup: docs/runbook.md#backup-and-restore.",
        )
