"""The exceptions nexhb raises itself. `sentence` is what a person reads first; `hint` says what to do.

The sentence is no docstring: `python -OO` (PYTHONOPTIMIZE=2) removes those.
"""

from __future__ import annotations

from typing import ClassVar


class NexhbError(Exception):
    """Every error that nexhb raises itself. Each subclass has a sentence of its own."""

    sentence: ClassVar[str] = "nexhb could not go on."

    def __init__(self, detail: str = "", *, hint: str = "") -> None:
        self.detail = detail
        self.hint = hint
        super().__init__(detail)

    def __str__(self) -> str:
        text = f"{self.sentence} {self.detail}" if self.detail else self.sentence
        return f"{text} {self.hint}" if self.hint else text


class ConfigError(NexhbError):
    sentence = "The configuration is not usable."


class UnsupportedLibrary(NexhbError, ImportError):
    sentence = "A library that nexhb needs has a version that nexhb does not support."


class CannotListen(NexhbError):
    sentence = "The daemon cannot listen for connections."


class EmbeddedPostgresError(NexhbError):
    sentence = "The embedded PostgreSQL is not usable."


class NoDatabase(NexhbError):
    sentence = "There is no database of nexhb here."


class MigrationError(NexhbError):
    sentence = "The database schema does not match this version of nexhb."


class LockHeld(NexhbError):
    sentence = "Somebody else is running this."


class LockLost(NexhbError):
    sentence = "The job's lock is not held any more."


class DatabaseUnavailable(NexhbError):
    sentence = "The database cannot be reached or cannot commit right now."

    def __init__(self, detail: str = "", *, hint: str = "", reason: str = "") -> None:
        super().__init__(detail, hint=hint)
        self.reason = reason  # what of it may be said to whoever asks; see pgerrors.reason


class NotConfirmed(DatabaseUnavailable):
    """A COMMIT that a synchronous standby may not have: a failover would lose it."""

    sentence = "The change is committed, but no synchronous standby has confirmed it."


class DatabaseUnfit(DatabaseUnavailable):
    sentence = "The database is not one that nexhb can use."


class PoolerBetween(DatabaseUnfit):
    sentence = "A pooler (pgbouncer or its like) stands before PostgreSQL and keeps what a session asks for to itself."

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, hint="Connect directly: database.url takes PostgreSQL's own address.")


class Overloaded(NexhbError):
    sentence = "No heartbeat is taken right now."


class UnknownDevice(NexhbError):
    sentence = "No such device is known."


class DeviceExists(NexhbError):
    sentence = "A device with this id or token is already known."


class EnrolmentRefused(NexhbError):
    sentence = "The enrolment key is not usable."


class BadInput(NexhbError):
    sentence = "The input is not usable."


class DayMissing(NexhbError):
    sentence = "The table of this day is not there any more."


class DayAttached(BadInput):
    """A day that is to be restored is there."""

    sentence = "The day is in the history already."


class PartitionBusy(NexhbError):
    sentence = "Somebody holds the table."


class NotDetachable(NexhbError):
    sentence = "PostgreSQL does not detach the partition."


class StoreError(NexhbError):
    sentence = "The archive store did not do what was asked."


class ObjectExists(StoreError):
    sentence = "An object of this name is in the archive store already."


class ObjectMissing(StoreError):
    sentence = "An object is not in the archive store."


class WrongStore(StoreError):
    sentence = "The archive store is not the one that the database knows."


class ArchiveDamaged(NexhbError):
    sentence = "An archive is not what its manifest says."


class JobFailed(NexhbError):
    sentence = "The job did not do all of its work."
