"""Check the logs of daemons and commands. Faults cause errors, and a fault must explain each error in a log: an error
that is not in ALLOWED, or a warning that still repeats after the end of all faults, is a violation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

QUIET_S = 11.0  # retries are at most 5 s apart, so an operation that keeps failing fails at least twice in this time
MAX_REPEATS = 1  # how often an event may occur in QUIET_S: once, as a late effect of a fault
MAX_SHOWN = 400  # characters of a log entry in a violation
# A fault may archive a day to which devices still write, and the day stays away: each later heartbeat of that day is
# late. The comparison of the rows shows whether it was stored as it should be.
LASTING = frozenset({"heartbeat.late"})
_SEVERE = ("error", "critical")
_POSTGRES_LINES = ("DETAIL:", "HINT:")
_TRACEBACK = "Traceback (most recent call last)"

# Matches the last line of a traceback, or an event's `error`, if the cause is a failed database or connection, or a
# lack of memory: an allocation can fail anywhere, even when a nightly run imports the module of the archive's store.
_LINE = (
    r"(builtins\.)?(Connection\w*Error|BrokenPipeError|OSError|TimeoutError|EOFError)"
    r"|asyncio\.exceptions\.\w+"
    r"|(asyncpg\.exceptions\.(_base\.)?)?(Interface|InternalClient|ConnectionDoesNotExist|ConnectionFailure)Error"
    r"|(asyncpg\.exceptions\.)?(CannotConnectNow|AdminShutdown|CrashShutdown|QueryCanceled|LockNotAvailable|DiskFull"
    r"|TooManyConnections|IdleInTransactionSessionTimeout|ReadOnlySQLTransaction|DeadlockDetected|OutOfMemory|Io)\w*"
    r"|(nexhb\.errors\.)?(DatabaseUnavailable|LockLost|LockHeld|PartitionBusy)"
    r"|RuntimeError: unable to perform operation on .*the handler is closed"
    r"|MemoryError"
)


# Matches what _LINE matches, errors of a store, and errors of the disk of the spool if it is full.
_STORE = rf"{_LINE}|OSError|(nexhb\.errors\.)?(StoreError|Object\w+|ArchiveDamaged)"


class Allowed(NamedTuple):
    """A reason why faults may cause an event."""

    reason: str
    error: str = ""  # a pattern that matches the beginning of the event's `error`, or of the last line of its traceback


ALLOWED = {
    "writer.not_ready": Allowed(
        "The database is unreachable: the writer logs that once, until it is ready again.", rf"{_LINE}|InDoubt"
    ),
    "partition.create_failed": Allowed(
        "The database became unreachable, or the disk full, while a partition was created.", _LINE
    ),
    "job.failed": Allowed(
        "The database became unreachable while a job ran, or its clock differs; the run is recorded as failed.",
        rf"{_LINE}|(nexhb\.errors\.)?JobFailed: .*(The job's connection was lost|in the database: set the clocks)",
    ),
    "job.metrics_not_read": Allowed("The database was unreachable; the next attempt follows a minute later.", _LINE),
    "job.not_run": Allowed("The database was unreachable when a job was due; the next attempt follows soon.", _LINE),
    "partition.ensure_failed": Allowed("The database was unreachable; partitions exist for the next two weeks.", _LINE),
    "adoption.failed": Allowed("The database was unreachable while a token was looked up.", _LINE),
    "nightly_maintenance.failed": Allowed("A step of the run failed, and has logged the reason."),
    "nightly_maintenance.step_failed": Allowed(
        "The database or the store became unreachable, or a disk is full.", rf"$|{_STORE}"
    ),
    "batch.failed_unexpectedly": Allowed("There was no memory for a batch.", "MemoryError"),
    "queue.no_memory": Allowed("There was no memory for a queue."),
    "reconciliation.failed": Allowed("The run lost the database: the event job.failed has the reason."),
    "archive.failed": Allowed("A day could not be archived: the database or its lock was lost."),
    "library.log": Allowed(
        "a future of asyncpg's for a lost connection, which nothing awaits; a transport without memory; an event loop "
        "that could not be created because no file could be opened.",
        rf"{_LINE}|deallocating an open event loop",
    ),
    "database.older": Allowed(
        "A copy or a lagging standby replaced the database, and the daemon noticed that it is older."
    ),
    "daemon.not_started": Allowed("The database was unreachable for longer than a start waits."),
}


class Entry(NamedTuple):
    """One JSON line of a log, or a traceback between such lines."""

    at: datetime | None
    level: str
    event: str
    fields: dict[str, Any]

    @property
    def error(self) -> str:
        """Return the entry's cause: the last line of its traceback, its `error`, or a library's message."""
        trace = str(self.fields.get("exception", "")).strip()
        if not trace:
            return str(self.fields.get("error", self.fields.get("message", "")))
        lines = [
            line for line in trace.splitlines() if not line.startswith(_POSTGRES_LINES)
        ]  # PostgreSQL appends these lines
        return lines[-1]

    @property
    def is_severe(self) -> bool:
        """Return whether the entry is an error or has a traceback, which a fault has to explain."""
        return self.level in _SEVERE or "exception" in self.fields

    def __str__(self) -> str:
        text = " ".join(f"{name}={value}" for name, value in self.fields.items())
        text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"
        return f"{self.event}: {text}"


def read(lines: Iterable[str]) -> Iterator[Entry]:
    """Yield the entries. A traceback that Python printed without a logger is an entry, too."""
    raw: list[str] = []
    for line in lines:
        try:
            fields = json.loads(line)
            entry = Entry(datetime.fromisoformat(fields.pop("ts")), fields.pop("level"), fields.pop("event"), fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            raw.append(line)
            continue
        yield from _traceback_entry(raw)
        raw = []
        yield entry
    yield from _traceback_entry(raw)


def _traceback_entry(raw: list[str]) -> Iterator[Entry]:
    text = "".join(raw)
    if _TRACEBACK in text:
        yield Entry(None, "critical", "traceback", {"exception": text})


def unexpected(entries: Iterable[Entry], allowed: dict[str, Allowed] = ALLOWED) -> Iterator[str]:
    """Yield one text for each kind of error that no fault explains: the number of its entries, and the first entry."""
    by_kind: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        rule = allowed.get(entry.event)
        if entry.is_severe and (rule is None or not re.match(rule.error, entry.error)):
            by_kind.setdefault((entry.event, entry.error[:60]), []).append(entry)
    for same in by_kind.values():
        yield f"{len(same)} times, at first {same[0]}"


def repeating(entries: Iterable[Entry], since: datetime, until: datetime) -> Iterator[str]:
    """Yield one text for each warning or error that was logged more than MAX_REPEATS times from `since` to `until`, an
    interval without a fault. LASTING events do not count."""
    warnings = [
        entry for entry in entries if entry.at and since <= entry.at <= until and entry.level not in ("info", "debug")
    ]
    for event, times in Counter(entry.event for entry in warnings).items():
        if times > MAX_REPEATS and event not in LASTING:
            last = next(entry for entry in reversed(warnings) if entry.event == event)
            yield f"{times} times in {(until - since).total_seconds():.0f} s without a fault: {last}"


def read_files(paths: Iterable[Path]) -> list[Entry]:
    """Return all entries of these files."""
    entries: list[Entry] = []
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            entries += read(file)
    return entries
