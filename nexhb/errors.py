"""The exceptions that nexhb itself raises. A message begins with `sentence`, and ends with `hint`, which says what to
do.

The sentence is not the docstring, since `python -OO` (PYTHONOPTIMIZE=2) removes docstrings.
"""

from __future__ import annotations

from typing import ClassVar


def described(error: BaseException) -> str:
    """Return the class and the message of an error, for the log and for details: many messages of libraries mean
    nothing without the class, and some are empty."""
    return f"{type(error).__name__}: {error}"


class NexhbError(Exception):
    """The base of every error that nexhb itself raises. Each subclass has its own sentence."""

    sentence: ClassVar[str] = "nexhb could not continue."

    def __init__(self, detail: str = "", *, hint: str = "") -> None:
        self.detail = detail
        self.hint = hint
        super().__init__(detail)

    def __str__(self) -> str:
        text = f"{self.sentence} {self.detail}" if self.detail else self.sentence
        return f"{text} {self.hint}" if self.hint else text


class ConfigError(NexhbError):
    sentence = "The configuration is not valid."


class UnsupportedLibrary(NexhbError, ImportError):
    sentence = "A library that nexhb needs has a version that nexhb does not support."


class CannotListen(NexhbError):
    sentence = "The daemon cannot listen for connections."


class EmbeddedPostgresError(NexhbError):
    sentence = "The embedded PostgreSQL is not usable."


class NoDatabase(NexhbError):
    sentence = "No nexhb database was found."


class MigrationError(NexhbError):
    sentence = "The database schema does not match this version of nexhb."


class StateChanged(NexhbError):
    sentence = "Another daemon has judged the same devices."


class LockHeld(NexhbError):
    sentence = "Another process is running this job."


class LockLost(NexhbError):
    sentence = "The job lost its lock."


class DatabaseUnavailable(NexhbError):
    sentence = "The database cannot be reached, or cannot commit right now."

    def __init__(self, detail: str = "", *, hint: str = "", reason: str = "") -> None:
        super().__init__(detail, hint=hint)
        self.reason = reason  # the part that a client without a key may see; see postgres.errors.reason


class NotConfirmed(DatabaseUnavailable):
    """A commit that may be missing on the synchronous standby: a failover would lose it."""

    sentence = "The change is committed, but no synchronous standby has confirmed it."


class DatabaseUnfit(DatabaseUnavailable):
    sentence = "The database is not suitable for nexhb."


class PoolerBetween(DatabaseUnfit):
    sentence = "A connection pooler such as pgbouncer stands before PostgreSQL and drops the session's settings."

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, hint="Connect directly: set database.url to the address of PostgreSQL itself.")


class Overloaded(NexhbError):
    sentence = "No heartbeat is accepted right now."


class UnknownDevice(NexhbError):
    sentence = "Device not found:"


class UnknownSite(NexhbError):
    sentence = "Site not found:"


class SiteInUse(NexhbError):
    sentence = "The site cannot be removed:"


class DeviceExists(NexhbError):
    sentence = "A device with this id or token already exists."


class EnrolmentRefused(NexhbError):
    sentence = "The enrolment key is not valid."


class BadInput(NexhbError):
    sentence = "The input is not valid."

    def __init__(self, detail: str = "", *, hint: str = "", field: str = "") -> None:
        super().__init__(detail, hint=hint)
        self.field = field  # the field or argument that is not valid; empty if the error has no single one


class DayMissing(NexhbError):
    sentence = "The table of this day no longer exists."


class DayAttached(BadInput):
    """The day to restore is attached to the history."""

    sentence = "The day is already in the history."


class PartitionBusy(NexhbError):
    sentence = "Another session has locked the table."


class NotDetachable(NexhbError):
    sentence = "PostgreSQL cannot detach the partition."


class StoreError(NexhbError):
    sentence = "The archive store failed."


class ObjectExists(StoreError):
    sentence = "An object with this name is already in the archive store."


class ObjectMissing(StoreError):
    sentence = "An object is missing in the archive store."


class WrongStore(StoreError):
    sentence = "The archive store is not the one that the database knows."


class ArchiveDamaged(NexhbError):
    sentence = "An archive does not match its manifest."


class JobFailed(NexhbError):
    sentence = "The job did not complete all of its work."


class DeliveryFailed(NexhbError):
    sentence = "A message was not delivered."
