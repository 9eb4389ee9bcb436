"""The classification of everything that can go wrong between nexhb and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from nexhb.errors import DatabaseUnavailable, DayMissing, PoolerBetween
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import Kind, classify, is_retryable, is_unavailable, reason


class ClientSideDataError(asyncpg.InterfaceError, ValueError):
    """An error as asyncpg raises for a value that it cannot encode, and for a DSN that it cannot parse."""


def from_server(sqlstate: str, **fields: str) -> asyncpg.PostgresError:
    """Return the error that asyncpg makes from the server's message."""
    return asyncpg.PostgresError.new({"S": "ERROR", "C": sqlstate, "M": "what the server says"} | fields)


SQLSTATES = [
    # connection lost
    ("08000", Kind.LOST), ("08001", Kind.LOST), ("08003", Kind.LOST), ("08006", Kind.LOST), ("08P01", Kind.LOST),
    ("57P01", Kind.LOST), ("57P02", Kind.LOST), ("57P03", Kind.LOST), ("57P04", Kind.LOST), ("57P05", Kind.LOST),
    ("25P03", Kind.LOST),
    # transient: serialization, deadlock, lock_timeout, statement_timeout, out of connections, memory or disk
    ("40001", Kind.TRANSIENT), ("40P01", Kind.TRANSIENT), ("55P03", Kind.TRANSIENT), ("57014", Kind.TRANSIENT),
    ("53000", Kind.TRANSIENT), ("53100", Kind.TRANSIENT), ("53200", Kind.TRANSIENT), ("53300", Kind.TRANSIENT),
    ("25006", Kind.TRANSIENT),
    # a row with this key already exists
    ("23505", Kind.DUPLICATE),
    # a missing table or schema, a character that the encoding lacks
    ("42P01", Kind.UNFIT), ("3F000", Kind.UNFIT), ("22P05", Kind.UNFIT),
    # data: never retried
    ("22000", Kind.DATA), ("22001", Kind.DATA), ("22003", Kind.DATA), ("22007", Kind.DATA), ("22021", Kind.DATA),
    ("22P02", Kind.DATA), ("22P03", Kind.DATA), ("23000", Kind.DATA), ("23502", Kind.DATA),
    ("23503", Kind.DATA), ("23P01", Kind.DATA),
    # anything else is a bug
    ("42601", Kind.BUG), ("42703", Kind.BUG), ("42501", Kind.BUG), ("21000", Kind.BUG),
    ("25P02", Kind.BUG), ("28P01", Kind.BUG), ("0A000", Kind.BUG), ("P0001", Kind.BUG), ("XX000", Kind.BUG),
    ("XX001", Kind.BUG), ("40003", Kind.BUG), ("57000", Kind.BUG), ("55000", Kind.BUG), ("ZZ999", Kind.BUG),
]  # fmt: skip


@pytest.mark.parametrize(("sqlstate", "kind"), SQLSTATES)
def test_an_error_of_the_server_is_classified_by_its_sqlstate(sqlstate: str, kind: Kind) -> None:
    error = from_server(sqlstate)
    assert error.sqlstate == sqlstate
    assert classify(error) is kind


def test_a_violated_check_is_an_error_of_the_data_if_it_has_a_name_and_else_a_missing_partition() -> None:
    assert classify(from_server("23514", n="device_heartbeats_battery_check")) is Kind.DATA
    assert classify(from_server("23514")) is Kind.NO_PARTITION


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        # the error of pg_terminate_backend inside `async with conn.transaction()`
        (asyncpg.InterfaceError("connection is closed"), Kind.LOST),
        (asyncpg.InternalClientError("unexpected message"), Kind.LOST),
        (asyncpg.exceptions.OutdatedSchemaCacheError("a type's schema changed"), Kind.LOST),
        (ConnectionResetError("Connection reset by peer"), Kind.LOST),
        (ConnectionRefusedError("Connection refused"), Kind.LOST),
        (FileNotFoundError("no such socket"), Kind.LOST),
        (OSError(113, "No route to host"), Kind.LOST),
        (TimeoutError(), Kind.LOST),
        (asyncio.IncompleteReadError(b"", 5), Kind.LOST),
        (EOFError(), Kind.LOST),
        (ClientSideDataError("invalid input for query argument $1"), Kind.DATA),
        (OverflowError("int too big to convert"), Kind.DATA),
        (TypeError("expected str, got int"), Kind.DATA),
        (ValueError("not a value"), Kind.DATA),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), Kind.DATA),
        (DayMissing("device_heartbeats_20261124."), Kind.NO_PARTITION),
        (AssertionError(), Kind.BUG),
        (KeyError("battery"), Kind.BUG),
        (RuntimeError("cannot perform operation"), Kind.BUG),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_without_an_sqlstate_is_classified_by_its_class(error: BaseException, kind: Kind) -> None:
    assert classify(error) is kind


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.NO_PARTITION])
def test_only_lost_and_transient_errors_are_retried(kind: Kind) -> None:
    errors = [from_server(sqlstate) for sqlstate, its_kind in SQLSTATES if its_kind is kind]
    assert errors
    assert {is_retryable(error) for error in errors} == {kind in (Kind.LOST, Kind.TRANSIENT)}
    assert {is_unavailable(error) for error in errors} == {kind in (Kind.LOST, Kind.TRANSIENT, Kind.UNFIT)}


# ---- errors of a real asyncpg and PostgreSQL ------------------------------------------------------


async def _value_that_cannot_be_encoded(conn: asyncpg.Connection) -> None:
    await conn.fetchval("SELECT $1::smallint", 70_000)


async def _value_of_another_type(conn: asyncpg.Connection) -> None:
    await conn.fetchval("SELECT $1::int[]", ["many"])


async def _row_that_cannot_be_encoded(conn: asyncpg.Connection) -> None:
    await conn.execute("CREATE TEMP TABLE t (n smallint)")
    await conn.copy_records_to_table("t", records=[(70_000,)])


async def _nul(conn: asyncpg.Connection) -> None:
    await conn.fetchval("SELECT $1::text", "a\0b")


async def _lone_surrogate(conn: asyncpg.Connection) -> None:
    await conn.fetchval("SELECT $1::text", "\ud83d")


async def _duplicate_key(conn: asyncpg.Connection) -> None:
    await conn.execute("CREATE TEMP TABLE t (n int PRIMARY KEY); INSERT INTO t VALUES (1), (1)")


async def _missing_table(conn: asyncpg.Connection) -> None:
    await conn.fetchval("SELECT count(*) FROM device_tokens")


async def _day_without_table(conn: asyncpg.Connection) -> None:
    await conn.execute("CREATE TEMP TABLE t (n int) PARTITION BY RANGE (n); INSERT INTO t VALUES (1)")


async def _named_check(conn: asyncpg.Connection) -> None:
    await conn.execute("CREATE TEMP TABLE t (n int CONSTRAINT odd CHECK (n > 1)); INSERT INTO t VALUES (1)")


async def _statement_timeout(conn: asyncpg.Connection) -> None:
    await conn.execute("SET statement_timeout = 1; SELECT pg_sleep(30)")


async def _terminated(conn: asyncpg.Connection) -> None:
    async with conn.transaction():
        await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def _terminated_before(conn: asyncpg.Connection) -> None:
    conn.terminate()
    await conn.execute("SELECT 1")


async def _syntax_error(conn: asyncpg.Connection) -> None:
    await conn.execute("SELEC 1")


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (_value_that_cannot_be_encoded, Kind.DATA),
        (_value_of_another_type, Kind.DATA),
        (_row_that_cannot_be_encoded, Kind.DATA),
        (_nul, Kind.DATA),
        (_lone_surrogate, Kind.DATA),
        (_duplicate_key, Kind.DUPLICATE),
        (_missing_table, Kind.UNFIT),
        (_day_without_table, Kind.NO_PARTITION),
        (_named_check, Kind.DATA),
        (_statement_timeout, Kind.TRANSIENT),
        (_terminated, Kind.LOST),
        (_terminated_before, Kind.LOST),
        (_syntax_error, Kind.BUG),
    ],
)
async def test_a_real_error_is_classified(
    empty_database: Database, cause: Callable[[asyncpg.Connection], Awaitable[None]], kind: Kind
) -> None:
    conn = await empty_database.connect(application="test")
    error = (await asyncio.gather(cause(conn), return_exceptions=True))[0]
    conn.terminate()
    assert error is not None
    assert classify(error) is kind, repr(error)


def unavailable(cause: BaseException) -> DatabaseUnavailable:
    """Wrap an error as every module does."""
    error = DatabaseUnavailable(f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('10.9.8.7', 5432)"), "it cannot be reached"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('10.9.8.7', 5432)"), "it cannot be reached"),
        (TimeoutError("10.9.8.7"), "it does not answer in time"),
        (from_server("28P01", M='password authentication failed for user "kiosks"'), "rejects the user"),
        (from_server("28000", M='no pg_hba.conf entry for host "10.9.8.7", user "kiosks"'), "rejects the user"),
        (from_server("3D000", M='database "kiosks" does not exist'), "does not exist"),
        (from_server("57P03", M="the database system is starting up"), "it is starting or stopping"),
        (from_server("53300", M='too many connections for role "kiosks"'), "it has no connection left"),
        (from_server("53100", M='could not extend file "base/kiosks"'), "its disk is full"),
        (from_server("25006", M="cannot execute INSERT in a read-only transaction"), "it is read-only"),
        (from_server("55000", M='database "kiosks" is not currently accepting connections'), "see the log of nexhb"),
        (from_server("XX000", M="10.9.8.7"), "see the log of nexhb"),
        (asyncpg.InterfaceError("connection to 10.9.8.7 is closed"), "it cannot be reached"),
        (MemoryError("kiosks"), "nexhb has too little memory"),
        (DatabaseUnavailable("kiosks", reason="it is read-only"), "it is read-only"),
        (DatabaseUnavailable("kiosks"), "see the log of nexhb"),
        (PoolerBetween("Its error: kiosks."), "A connection pooler"),
    ],
)
def test_a_client_without_a_key_receives_a_reason_without_the_databases_message(error: Exception, words: str) -> None:
    for text in (reason(error), reason(unavailable(error)), reason(unavailable(unavailable(error)))):
        assert words in text
        assert "kiosks" not in text
        assert "10.9.8.7" not in text
