"""Nothing is left running and nothing is left lying, however a run ends: a process of its own waits for the run's end
(the end of its standard input, which the kernel brings about in any case), ends what it was told of and was not told
to forget, and removes the folder."""

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

PATIENCE_S = 20.0  # for a postmaster to end


class Guard:
    """What to clear away, told line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, what: str, value: object) -> None:
        """`child PID`, `ended PID`, `postmaster PGDATA`, `mount PATH`, `folder PATH`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {value}\n")
        self._process.stdin.flush()


@contextmanager
def guarding() -> Iterator[Guard]:
    """A guard for the block; behind it everything is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.guard"],
        stdin=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent,
        start_new_session=True,  # a Ctrl-C at the terminal is not for it
    )  # fmt: skip
    try:
        yield Guard(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE_S * 2)


def born(pid: int) -> str:
    """When a process was started, in ticks: with its number, its name for as long as the machine runs."""
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
    """An immediate stop, which its children follow; nobody needs the data any more."""
    deadline = time.monotonic() + PATIENCE_S
    while (pid := _postmaster(pgdata)) and time.monotonic() < deadline:
        _end(pid, signal.SIGCONT)
        _end(pid, signal.SIGQUIT)
        time.sleep(0.05)


def main() -> None:
    """Read what there is; at its end, clear away."""
    children: dict[int, str] = {}
    told: dict[str, list[str]] = {"postmaster": [], "mount": [], "folder": []}
    for line in sys.stdin:
        what, _, value = line.rstrip("\n").partition(" ")
        if what == "child":
            with suppress(OSError):
                children[int(value)] = born(int(value))
        elif what == "ended":
            children.pop(int(value), None)
        else:
            told[what].append(value)
    for pid, started in children.items():
        with suppress(OSError):
            if born(pid) == started:
                _end(pid, signal.SIGKILL)
    for pgdata in told["postmaster"]:
        _end_postmaster(Path(pgdata))
    for path in told["mount"]:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)
    for path in told["folder"]:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
