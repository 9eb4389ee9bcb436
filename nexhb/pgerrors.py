"""One classifier for everything that can go wrong between nexhb and PostgreSQL."""

from __future__ import annotations

import enum

import asyncpg

from nexhb.errors import DatabaseUnavailable, DayMissing


class Kind(enum.StrEnum):
    """What an error means for the work at hand."""

    LOST = "lost"  # the connection is gone: reconnect, then ask what became of the transaction
    TRANSIENT = "transient"  # the same work may succeed a moment later
    DUPLICATE = "duplicate"  # a row with this key is there already (23505)
    NO_PARTITION = "no_partition"  # the day's table is not there (any more)
    DATA = "data"  # a value that will never go in, however often it is tried
    UNFIT = "unfit"  # a table is missing, or the encoding is another: no row is to blame
    BUG = "bug"  # nobody expected this: 503, a log line, a metric


# 40001 serialization, 40P01 deadlock, 55P03 lock_timeout, 57014 statement_timeout, 53xxx resources.
# 25006: the database is read-only for now (a standby, a provider's answer to a full disk).
_TRANSIENT = ("40001", "40P01", "55P03", "57014", "53", "25006")
_CLOSED = "the handler is closed"  # uvloop's RuntimeError: asyncpg goes on writing to a connection that is gone
_SEAL = "_sealed"  # ends the name of the CHECK that keeps rows out of a detached day; a CHECK of ours has another name
# 42P01: a table that is not there, other than a day's (DayMissing); 3F000: its schema. 22P05: a character that the
# database's encoding does not have; every session checks the encoding, so this is not the database that it was.
_UNFIT = ("42P01", "3F000", "22P05")
# Errors without an SQLSTATE.
_LOST_CLASSES = (
    asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError, TimeoutError, DatabaseUnavailable,
    MemoryError,  # in the middle of an answer: nobody knows where the connection stands
)  # fmt: skip
# Whatever a call to the database may raise, where every kind of it is answered in one way.
FROM_THE_DATABASE = (*_LOST_CLASSES, asyncpg.PostgresError)
# 57P01 admin shutdown, 57P02 crash, 57P03 cannot connect now, 57P05 idle timeout; 25P03 idle in transaction.
_LOST = ("08", "57P0", "25P03")


def classify(error: BaseException) -> Kind:
    """The kind of `error`. An error without an SQLSTATE on a closed connection surfaces as
    InterfaceError (asyncpg), so the class counts where there is no code."""
    state = str(getattr(error, "sqlstate", None) or "")
    if isinstance(error, DayMissing) or (
        state == "23514" and str(getattr(error, "constraint_name", None) or _SEAL).endswith(_SEAL)
    ):
        return Kind.NO_PARTITION  # a row's time fits no partition, or not this one, or its day is sealed or gone
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
    """True where the same work may succeed when tried again."""
    return classify(error) in (Kind.LOST, Kind.TRANSIENT)


def is_unavailable(error: BaseException) -> bool:
    """True where the database cannot answer now, whatever it is asked: 503, and not the caller's fault."""
    return classify(error) in (Kind.LOST, Kind.TRANSIENT, Kind.UNFIT)


# What may be said to whoever asks, by SQLSTATE or its beginning.
_REASONS = {
    "25006": "it is read-only",
    "28": "it does not accept the user or the password of database.url",
    "3D000": "the database that database.url names does not exist",
    "40": "transactions conflict",
    "3F000": "the schema of nexhb is missing",
    "42P01": "a table of nexhb is missing",
    "42501": "the user of database.url lacks a privilege",
    "53100": "its disk is full",
    "53300": "it has no connection left",
    "53": "it has not enough memory or disk",
    "55P03": "somebody holds a lock",
    "57014": "a statement took too long or was cancelled",
    "57P0": "it is starting or stopping",
}


def reason(error: BaseException) -> str:
    """Why the database is not available, in words fit for whoever asks without a key: none of PostgreSQL's own, which
    name hosts, roles and settings. Those are for the log."""
    while type(error) is DatabaseUnavailable and not error.reason and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DatabaseUnavailable):
        told = error.sentence.rstrip(".") if type(error) is not DatabaseUnavailable else "see the log of nexhb"
        return error.reason or told
    state = str(getattr(error, "sqlstate", None) or "")
    for start in (state, state[:4], state[:2]):
        if start in _REASONS:
            return _REASONS[start]
    if isinstance(error, MemoryError):
        return "nexhb has not enough memory"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return "it cannot be reached" if classify(error) is Kind.LOST else "see the log of nexhb"
