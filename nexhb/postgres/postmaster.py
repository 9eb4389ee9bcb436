"""The embedded PostgreSQL's main process, the postmaster: find, start, adopt and end it.

nexhb never sends SIGKILL, which would leave backends without a postmaster.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nexhb.errors import EmbeddedPostgresError
from nexhb.postgres.cluster_files import Cluster
from nexhb.postgres.sharing import POLL_S, try_exclusive

SILENT_S = 10.0  # restart a postmaster that reports ready but does not answer for this long
# The fast, then the immediate shutdown, with a timeout for each.
STOPS = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 30.0))

# PostgreSQL's error for dynamic shared memory, which it creates in /dev/shm.
_SHARED_MEMORY = re.compile(r"could not (open|resize|map) shared memory segment")
_SHM = (
    "PostgreSQL needs /dev/shm: mount a tmpfs of 64 MB or more there, writable by its user (of a container: "
    "--shm-size=256m)."
)

Progress = tuple[str | bytes, ...]

# Postmasters that this process started, to reap them. A Popen whose postmaster is left running stays here too: Python
# would warn of it (ResourceWarning).
_children: dict[tuple[int, Path], subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class PidFile:
    """The content of postmaster.pid."""

    pid: int
    pgdata: str
    sockets: str
    status: str  # starting, ready, stopping; empty while PostgreSQL is writing the file


def read_pid_file(pgdata: Path) -> PidFile | None:
    """Return the content of postmaster.pid, also if that postmaster is dead; None if there is no file, or an incomplete
    one.
    """
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        lines = os.fsdecode((pgdata / "postmaster.pid").read_bytes()).split("\n")
        pid, (folder, sockets, status) = int(lines[0]), [*lines, *[""] * 8][1:8:3]
        return PidFile(pid, folder, sockets, status.strip())
    return None


def is_alive(pid: int, pgdata: Path) -> bool:
    """Return whether the process is alive and a PostgreSQL of this data folder. Reap it if it was a child of this
    process."""
    if child := _children.get((pid, pgdata)):
        if child.poll() is None:
            return True
        del _children[pid, pgdata]
    process = Path("/proc", str(pid))
    with contextlib.suppress(OSError):
        return (process / "comm").read_text() == "postgres\n" and (process / "cwd").samefile(pgdata)
    return False


def recovery_of(postmaster: int) -> Progress:
    """Return the progress of the startup process of this postmaster; empty if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state ppid …; utime and stime are the 14th and 15th
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            title = (process / "cmdline").read_bytes() if int(fields[1]) == postmaster else b""
            if b"startup" in title:
                return (process.name, *fields[11:13], title)
    return ()


def running(pgdata: Path) -> PidFile | None:
    """Return the pid file of the running postmaster, or None if none is running."""
    postmaster = read_pid_file(pgdata)
    return postmaster if postmaster and is_alive(postmaster.pid, pgdata) else None


def adopt(cluster: Cluster, lock: IO[bytes]) -> PidFile | None:
    """Return the postmaster that is already running, once it accepts connections; None if none is running any more."""
    silent_since: float | None = None
    while postmaster := read_pid_file(cluster.pgdata):
        alive, name = is_alive(postmaster.pid, cluster.pgdata), f"Postmaster {postmaster.pid}"
        if postmaster.status == "ready" and _accepts(postmaster, alive, cluster):
            return postmaster
        if not alive:
            if try_exclusive(lock):
                return None
            cluster.deadline.wait(
                f"{name} is not visible, but other processes use the cluster", "End them, and start again."
            )
        elif postmaster.status != "ready":
            silent_since = None
            cluster.deadline.wait(f"{name} is {postmaster.status or 'starting'}", f"See {cluster.log_dir}.")
        else:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENT_S and try_exclusive(lock):
                terminate(postmaster.pid, cluster.pgdata)  # the socket was deleted, or the postmaster hangs
                return None
            cluster.deadline.wait(f"{name} does not answer", "End the processes that use the cluster, and start again.")
    return None


def _accepts(postmaster: PidFile, alive: bool, cluster: Cluster) -> bool:
    """Return whether the postmaster accepts connections."""
    # Containers that share a volume see each other's sockets, but not processes. If the folder was copied while
    # PostgreSQL ran in it, neither socket nor process belongs to the copy.
    same_cluster = alive or postmaster.pgdata == str(cluster.pgdata)
    args = ("-q", "-t", "3", "-h", postmaster.sockets, "-p", "5432")
    return bool(same_cluster and postmaster.sockets) and cluster.account.can(cluster.bin_dir / "pg_isready", *args)


def spawn(cluster: Cluster) -> PidFile:
    """Start a postmaster and return its pid file once it accepts connections. Raises EmbeddedPostgresError."""
    # A stale postmaster.pid may name an unrelated process, since process ids start again in each container. PostgreSQL
    # regards the id in this variable as its caller, not as another postmaster; PostgreSQL still checks the shared
    # memory.
    stale = read_pid_file(cluster.pgdata)
    account_args = cluster.account.popen(**({"PG_GRANDPARENT_PID": str(stale.pid)} if stale else {}))
    shell = ("/bin/sh", "-c", 'umask 077; exec "$@" >"$0" 2>&1', str(cluster.log_dir / "start.log"))
    while True:
        child = subprocess.Popen(  # noqa: S603
            [*shell, str(cluster.bin_dir / "postgres"), "-D", str(cluster.pgdata)], **account_args,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # the postmaster must not receive Ctrl-C from the terminal
        )  # fmt: skip
        _children[child.pid, cluster.pgdata] = child
        try:
            while is_alive(child.pid, cluster.pgdata):
                postmaster = read_pid_file(cluster.pgdata)
                if postmaster and postmaster.pid == child.pid and postmaster.status == "ready":
                    return postmaster
                cluster.deadline.wait(
                    "PostgreSQL is starting or recovering from a crash", f"It continues, see {cluster.log_dir}."
                )
        except (KeyboardInterrupt, SystemExit):
            child.terminate()  # in case the child does not handle signals yet, and ignores SIGINT
            child.send_signal(signal.SIGINT)
            raise
        output = _last_log_lines(cluster.log_dir)
        # the backends of a killed postmaster notice its death only at the end of their statement
        if "pre-existing shared memory block" not in output:
            raise EmbeddedPostgresError(f"PostgreSQL exited during its start:\n{output}\n", hint=hint_for(output))
        cluster.deadline.wait("Backends of a killed postmaster are still running")


def hint_for(output: str) -> str:
    """Return the remedy for an error in PostgreSQL's output; empty if none is known."""
    return _SHM if _SHARED_MEMORY.search(output) else ""


def _last_log_lines(log_dir: Path) -> str:
    """Return the end of the latest log files, from before and after the log collector started."""
    lines: list[str] = []
    collected = sorted(log_dir.glob("postgresql-*.log"), key=lambda path: path.stat().st_mtime)
    for path in (log_dir / "start.log", *collected[-1:]):
        with contextlib.suppress(OSError):
            lines += path.read_text(errors="replace").splitlines()[-8:]
    return "\n".join(lines)


def terminate(pid: int, pgdata: Path) -> None:
    """Request a fast shutdown, then an immediate one; never SIGKILL, which leaves backends without a postmaster."""
    for number, timeout_s in STOPS:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)  # a suspended process handles the first signal only once it continues
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not is_alive(pid, pgdata):
                return
            time.sleep(POLL_S)
    hint = f"See {pgdata.parent / 'pg-log'} for what it waits for."
    raise EmbeddedPostgresError(f"Postmaster {pid} did not shut down when asked to.", hint=hint)
