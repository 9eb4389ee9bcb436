"""What the daemons and commands logged, as a witness: faults make errors, and each error must be one that a fault
explains. Whatever is not on the list below, and whatever goes on repeating after the healing, is a violation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

QUIET_S = 11.0  # a pause between two attempts is 5 s at most: what goes on failing fails at least twice in this time
REPEATS_MOST = 1  # of one event in that time; one that was late is no repetition
SHOWN = 400  # characters of an entry in a violation
_SEVERE = ("error", "critical")
_MORE = ("DETAIL:", "HINT:")
_TRACEBACK = "Traceback (most recent call last)"

# The last line of a traceback, or an event's `error`, where the cause is a database or a line that is broken.
_LINE = (
    r"(builtins\.)?(Connection\w*Error|BrokenPipeError|OSError|TimeoutError|EOFError)"
    r"|asyncio\.exceptions\.\w+"
    r"|(asyncpg\.exceptions\.(_base\.)?)?(Interface|InternalClient|ConnectionDoesNotExist|ConnectionFailure)Error"
    r"|(asyncpg\.exceptions\.)?(CannotConnectNow|AdminShutdown|CrashShutdown|QueryCanceled|LockNotAvailable|DiskFull"
    r"|TooManyConnections|IdleInTransactionSessionTimeout|ReadOnlySQLTransaction|DeadlockDetected|OutOfMemory|Io)\w*"
    r"|(nexhb\.errors\.)?(DatabaseUnavailable|LockLost|LockHeld|PartitionBusy)"
    r"|RuntimeError: unable to perform operation on .*the handler is closed"
)


# The same, or what a store or a full disk below the spool says.
_STORE = rf"{_LINE}|OSError|(nexhb\.errors\.)?(StoreError|Object\w+|ArchiveDamaged)"


class Allowed(NamedTuple):
    """An event that faults explain, and why."""

    reason: str
    error: str = ""  # what its `error`, or its traceback's last line, must begin with: a pattern


ALLOWED = {
    "writer.not_ready": Allowed(
        "The database is away: the writer says so once, until it is ready again.", rf"{_LINE}|_InDoubt"
    ),
    "partition.create_failed": Allowed("The database went away, or the disk is full, while a day was made.", _LINE),
    "job.failed": Allowed(
        "The database went away while a job ran, or its clock is another; the run is written down as failed.",
        rf"{_LINE}|(nexhb\.errors\.)?JobFailed: .*(Its connection was lost|in the database: set the clocks)",
    ),
    "job.metrics_not_read": Allowed("The database was away; the next look is a minute later.", _LINE),
    "job.not_run": Allowed("The database was away when a job was due; the next look is soon.", _LINE),
    "partition.ensure_failed": Allowed("The database was away; days stand ahead for two weeks.", _LINE),
    "adoption.failed": Allowed("The database was away while a token was looked for.", _LINE),
    "nightly_maintenance.failed": Allowed("A run of which a step failed: each step has said why."),
    "nightly_maintenance.step_failed": Allowed(
        "The database or the store went away, or a disk is full.", rf"$|{_STORE}"
    ),
    "batch.failed_unexpectedly": Allowed("There was no memory for it.", "MemoryError"),
    "queue.no_memory": Allowed("There was no memory for a queue."),
    "reconciliation.failed": Allowed("A run that the database left: job.failed has said why."),
    "archive.failed": Allowed("A day could not be archived: the database or its lock was lost."),
    "library.log": Allowed(
        "asyncpg's own future of a connection that is lost, and for which nobody waits; a transport without memory.",
        rf"{_LINE}|MemoryError",
    ),
    "database.older": Allowed("A copy or a lagging standby took the database's place, and is known to be older."),
    "daemon.not_started": Allowed("A start that met a database that was away for longer than it waits."),
}


class Entry(NamedTuple):
    """One line of a log, or a text between such lines that is none of them."""

    at: datetime | None
    level: str
    event: str
    said: dict[str, Any]

    @property
    def error(self) -> str:
        """What it names as the cause: its `error`, or the last line of its traceback."""
        trace = str(self.said.get("exception", "")).strip()
        if not trace:
            return str(self.said.get("error", ""))
        lines = [line for line in trace.splitlines() if not line.startswith(_MORE)]  # what PostgreSQL adds below
        return lines[-1]

    @property
    def is_severe(self) -> bool:
        """Whether somebody should have to explain it."""
        return self.level in _SEVERE or "exception" in self.said

    def __str__(self) -> str:
        text = " ".join(f"{name}={value}" for name, value in self.said.items())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        return f"{self.event}: {text}"


def read(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries. Python's own last words, which no logger wrote, are one entry as well."""
    raw: list[str] = []
    for line in lines:
        try:
            said = json.loads(line)
            entry = Entry(datetime.fromisoformat(said.pop("ts")), said.pop("level"), said.pop("event"), said)
        except (ValueError, KeyError, TypeError, AttributeError):
            raw.append(line)
            continue
        yield from _last_words(raw)
        raw = []
        yield entry
    yield from _last_words(raw)


def _last_words(raw: list[str]) -> Iterator[Entry]:
    text = "".join(raw)
    if _TRACEBACK in text:
        yield Entry(None, "critical", "traceback", {"exception": text})


def unexpected(entries: Iterable[Entry], allowed: dict[str, Allowed] = ALLOWED) -> Iterator[str]:
    """Each kind of severe entry that no fault explains, once, with the first of them."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        rule = allowed.get(entry.event)
        if entry.is_severe and (rule is None or not re.match(rule.error, entry.error)):
            found.setdefault((entry.event, entry.error[:60]), []).append(entry)
    for those in found.values():
        yield f"{len(those)} times, at first {those[0]}"


def repeating(entries: Iterable[Entry], since: datetime, until: datetime) -> Iterator[str]:
    """Each event that goes on while nothing is broken: warnings and worse, from `since` to `until`."""
    of_then = [one for one in entries if one.at and since <= one.at <= until and one.level not in ("info", "debug")]
    for event, times in Counter(one.event for one in of_then).items():
        if times > REPEATS_MOST:
            last = next(one for one in reversed(of_then) if one.event == event)
            yield f"{times} times in {(until - since).total_seconds():.0f} s in which nothing is broken: {last}"


def read_files(paths: Iterable[Path]) -> list[Entry]:
    """All entries of these files."""
    found: list[Entry] = []
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            found += read(file)
    return found
