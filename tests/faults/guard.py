"""The guard: however a run ends, it leaves no process and no file. The guard is a separate process that waits for the
run's end (the end of its standard input, which the kernel closes in any case). It then kills each process that the run
has reported as started but not as ended, and removes the folders that the run has reported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

END_S = 20.0  # timeout for the end of a postmaster


class Guard:
    """The run's side of the guard: it reports to the guard's process, one per line, what has to be removed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def report(self, what: str, value: object) -> None:
        """Report `child PID`, `ended PID`, `postmaster PGDATA`, `mount PATH` or `folder PATH`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {value}\n")
        self._process.stdin.flush()


@contextmanager
def guarding() -> Iterator[Guard]:
    """Run a guard for the block; when the block ends, the guard removes everything that was reported to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.guard"],
        stdin=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent,
        start_new_session=True,  # so that a Ctrl-C at the terminal does not reach the guard
    )  # fmt: skip
    try:
        yield Guard(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(END_S * 2)


def started_at(pid: int) -> str:
    """Return when a process was started, in clock ticks since boot. Together with the process ID, this identifies a
    process until the machine is rebooted."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]


def _end(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _postmaster(pgdata: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        pid = int((pgdata / "postmaster.pid").read_text().splitlines()[0])
        if Path("/proc", str(pid), "cwd").samefile(pgdata):
            return pid
    return None


def _end_postmaster(pgdata: Path) -> None:
    """Shut a cluster down (immediate), which also ends its children; its data is not needed any more."""
    deadline = time.monotonic() + END_S
    while (pid := _postmaster(pgdata)) and time.monotonic() < deadline:
        _end(pid, signal.SIGCONT)
        _end(pid, signal.SIGQUIT)
        time.sleep(0.05)


def main() -> None:
    """Read the reports until the input ends, then remove everything that was reported."""
    children: dict[int, str] = {}
    reported: dict[str, list[str]] = {"postmaster": [], "mount": [], "folder": []}
    for line in sys.stdin:
        what, _, value = line.rstrip("\n").partition(" ")
        if what == "child":
            with suppress(OSError):
                children[int(value)] = started_at(int(value))
        elif what == "ended":
            children.pop(int(value), None)
        else:
            reported[what].append(value)
    for pid, ticks in children.items():
        with suppress(OSError):
            if started_at(pid) == ticks:
                _end(pid, signal.SIGKILL)
    for pgdata in reported["postmaster"]:
        _end_postmaster(Path(pgdata))
    for path in reported["mount"]:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)
    for path in reported["folder"]:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
