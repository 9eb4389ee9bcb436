"""The exceptions nexhb raises itself. The docstring is the sentence a person reads; `hint` says what to do."""

from __future__ import annotations


class NexhbError(Exception):
    """nexhb could not go on."""

    def __init__(self, detail: str = "", *, hint: str = "") -> None:
        self.detail = detail
        self.hint = hint
        super().__init__(detail)

    def __str__(self) -> str:
        sentence = (type(self).__doc__ or "").strip()
        text = f"{sentence} {self.detail}" if self.detail else sentence
        return f"{text} {self.hint}" if self.hint else text


class ConfigError(NexhbError):
    """The configuration is not usable."""


class EmbeddedPostgresError(NexhbError):
    """The embedded PostgreSQL is not usable."""


class MigrationError(NexhbError):
    """The database schema does not match this version of nexhb."""


class LockHeld(NexhbError):
    """Somebody else is running this."""


class LockLost(NexhbError):
    """The job's lock is not held any more."""


class DatabaseUnavailable(NexhbError):
    """The database cannot be reached or cannot commit right now."""


class PoolerBetween(DatabaseUnavailable):
    """A pooler (pgbouncer or its like) stands before PostgreSQL and keeps what a session asks for to itself."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, hint="Connect directly: database.url takes PostgreSQL's own address.")


class Overloaded(NexhbError):
    """No heartbeat is taken right now."""


class UnknownDevice(NexhbError):
    """No such device is known."""


class DeviceExists(NexhbError):
    """A device with this id or token is already known."""


class EnrolmentRefused(NexhbError):
    """The enrolment key is not usable."""


class BadInput(NexhbError):
    """The input is not usable."""


class PartitionBusy(NexhbError):
    """Somebody holds the table."""


class StoreError(NexhbError):
    """The archive store did not do what was asked."""


class ObjectExists(StoreError):
    """An object of this name is in the archive store already."""


class ObjectMissing(StoreError):
    """An object is not in the archive store."""


class ArchiveDamaged(NexhbError):
    """An archive is not what its manifest says."""


class JobFailed(NexhbError):
    """The job did not do all of its work."""
