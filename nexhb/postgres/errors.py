"""Classify everything that can go wrong between nexhb and PostgreSQL."""

from __future__ import annotations

import enum

import asyncpg

from nexhb.errors import DatabaseUnavailable, DayMissing


class Kind(enum.StrEnum):
    """What an error means for the operation that raised it."""

    LOST = "lost"  # the connection is gone: reconnect, then find out whether the transaction was committed
    TRANSIENT = "transient"  # the same operation may succeed a moment later
    DUPLICATE = "duplicate"  # a row with this key already exists (23505)
    NO_PARTITION = "no_partition"  # the day's table does not exist yet, or no longer
    DATA = "data"  # a value that PostgreSQL will always reject
    UNFIT = "unfit"  # a table is missing, or the encoding has changed: no row is the cause
    BUG = "bug"  # unexpected: 503, a log line, a metric


# 40001 serialization, 40P01 deadlock, 55P03 lock_timeout, 57014 statement_timeout, 53xxx resources.
# 25006: the database is read-only for now (a standby, a provider's answer to a full disk).
_TRANSIENT = ("40001", "40P01", "55P03", "57014", "53", "25006")
_CLOSED = "the handler is closed"  # uvloop's RuntimeError, if asyncpg writes to a connection that is gone
_SEAL = "_sealed"  # suffix of the CHECK that keeps rows out of a detached day; nexhb's other CHECKs have no such suffix
# 42P01: a missing table other than a day's (DayMissing); 3F000: a missing schema. 22P05: a character that the
# database's encoding lacks; every session checks the encoding, so the database must have been replaced.
_UNFIT = ("42P01", "3F000", "22P05")
# Errors without an SQLSTATE.
_LOST_CLASSES = (
    asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError, TimeoutError, DatabaseUnavailable,
    MemoryError,  # raised in the middle of a response: the state of the connection is unknown
)  # fmt: skip
# All that a call to the database may raise, for callers that handle every kind alike.
FROM_THE_DATABASE = (*_LOST_CLASSES, asyncpg.PostgresError)
# 57P01 admin shutdown, 57P02 crash, 57P03 cannot connect now, 57P05 idle timeout; 25P03 idle in transaction.
_LOST = ("08", "57P0", "25P03")


def classify(error: BaseException) -> Kind:
    """Return the kind of `error`. asyncpg reports a closed connection as an InterfaceError without an SQLSTATE, so the
    class decides if there is no code."""
    state = str(getattr(error, "sqlstate", None) or "")
    if isinstance(error, DayMissing) or (
        state == "23514" and str(getattr(error, "constraint_name", None) or _SEAL).endswith(_SEAL)
    ):
        return Kind.NO_PARTITION  # the day's partition is missing, wrong, sealed or dropped
    if state:
        return _by_state(state)
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return Kind.DATA  # the client could not encode a value: asyncpg.exceptions._base.InterfaceError + ValueError
    if isinstance(error, _LOST_CLASSES) or (isinstance(error, RuntimeError) and _CLOSED in str(error)):
        return Kind.LOST
    if isinstance(error, OverflowError | ValueError | TypeError):
        return Kind.DATA
    return Kind.BUG


def _by_state(state: str) -> Kind:
    if state.startswith(_LOST):
        return Kind.LOST
    if state.startswith(_TRANSIENT):
        return Kind.TRANSIENT
    if state == "23505":
        return Kind.DUPLICATE
    if state in _UNFIT:
        return Kind.UNFIT
    if state.startswith(("22", "23")):
        return Kind.DATA
    return Kind.BUG


def is_retryable(error: BaseException) -> bool:
    """Return whether the same operation may succeed on a retry."""
    return classify(error) in (Kind.LOST, Kind.TRANSIENT)


def is_unavailable(error: BaseException) -> bool:
    """Return whether the database cannot serve any query now: 503, and not the caller's fault."""
    return classify(error) in (Kind.LOST, Kind.TRANSIENT, Kind.UNFIT)


# What a client without a key may see, by SQLSTATE or its prefix.
_REASONS = {
    "25006": "it is read-only",
    "28": "it rejects the user or the password of database.url",
    "3D000": "the database that database.url names does not exist",
    "40": "transactions conflict",
    "3F000": "the schema of nexhb is missing",
    "42P01": "a table of nexhb is missing",
    "42501": "the user of database.url lacks a privilege",
    "53100": "its disk is full",
    "53300": "it has no connection left",
    "53": "it has too little memory or disk space",
    "55P03": "another session holds a lock",
    "57014": "a statement took too long or was cancelled",
    "57P0": "it is starting or stopping",
}


def reason(error: BaseException) -> str:
    """Return why the database is not available, for clients without a key. PostgreSQL's own message, which names hosts,
    roles and settings, is for the log."""
    while type(error) is DatabaseUnavailable and not error.reason and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DatabaseUnavailable):
        text = error.sentence.rstrip(".") if type(error) is not DatabaseUnavailable else "see the log of nexhb"
        return error.reason or text
    state = str(getattr(error, "sqlstate", None) or "")
    for prefix in (state, state[:4], state[:2]):
        if prefix in _REASONS:
            return _REASONS[prefix]
    if isinstance(error, MemoryError):
        return "nexhb has too little memory"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return "it cannot be reached" if classify(error) is Kind.LOST else "see the log of nexhb"
