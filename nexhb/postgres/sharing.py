"""File locks and a deadline: with these, processes that share the embedded PostgreSQL wait for each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from nexhb.errors import EmbeddedPostgresError
from nexhb.postgres.account import Account

POLL_S = 0.01
START_LOCK = "embedded.start.lock"
PROGRESS_S = 5.0  # while a process waits, it logs this often what it waits for

Log = Callable[..., None]


def no_log(event: str, **fields: object) -> None:
    """Log nothing."""


class Deadline:
    """Wait in short steps up to a deadline, and log every few seconds what the process waits for."""

    def __init__(self, timeout_s: float, log: Log) -> None:
        self.log = log
        self.started_at = self.logged_at = time.monotonic()
        self.deadline = self.started_at + timeout_s

    @property
    def left_s(self) -> float:
        """Return the seconds left, negative after the deadline."""
        return self.deadline - time.monotonic()

    def wait(self, reason: str, hint: str = "") -> None:
        """Sleep for a moment. Raises EmbeddedPostgresError with the reason after the deadline."""
        now = time.monotonic()
        if now > self.deadline:
            raise EmbeddedPostgresError(f"{reason}, for {now - self.started_at:.0f} s now.", hint=hint)
        if now - self.logged_at > PROGRESS_S:
            self.logged_at = now
            self.log("embedded.waiting", why=reason, waited_s=round(now - self.started_at))
        time.sleep(POLL_S)


def open_lock(path: Path, account: Account) -> IO[bytes]:
    """Open a lock file that belongs to the account. Python opens it with close-on-exec, so no child keeps the lock."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            os.fchown(descriptor, account.uid, account.gid)
        os.close(descriptor)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b", buffering=0)


def try_exclusive(lock: IO[bytes]) -> bool:
    """Take the lock exclusively if no other process holds it, and return whether that succeeded."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def start_lock(data_dir: Path, account: Account, deadline: Deadline) -> Iterator[None]:
    """Hold the lock that excludes another start or stop. Raises EmbeddedPostgresError after the deadline."""
    with open_lock(data_dir / START_LOCK, account) as lock:
        while not try_exclusive(lock):
            deadline.wait("Another nexhb process is starting or stopping the cluster")
        yield
