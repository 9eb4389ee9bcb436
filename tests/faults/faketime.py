"""A separate clock for a run's PostgreSQL: libfaketime, if Debian's package is installed, reads an offset from a file
and adds it to the time of day. Monotonic time stays the machine's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from nexhb.postgres import account as pg_account
from nexhb.postgres import embedded
from nexhb.postgres.account import Account

_FILES_OF_PROCESS = ("faketime_shm_{}", "sem.faketime_sem_{}")  # not removed if the process was killed


def library() -> Path | None:
    """Return the path of the library; None if it is not installed (apt-get install libfaketime)."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@dataclass(frozen=True)
class Clock:
    """A clock for a PostgreSQL. Its file contains the seconds by which the clock is ahead of the machine's."""

    file: Path
    library: Path

    def step(self, ahead: timedelta) -> None:
        """Set how far the clock is ahead; every process of that PostgreSQL sees the change at once."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{ahead / timedelta(seconds=1):+.0f}")
        new.chmod(0o644)
        new.replace(self.file)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make a process use this clock."""
        return {
            "LD_PRELOAD": str(self.library), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }  # fmt: skip


@dataclass(frozen=True)
class _AccountWithClock(Account):
    """An account whose postmaster uses `clock`; programs that `run` starts use the machine's clock."""

    clock: Clock

    def popen(self, **env: str) -> dict[str, Any]:
        return super().popen(**env, **self.clock.environment)

    def run(self, *argv: str | Path, stdin: str = "", timeout_s: float = 60.0) -> str:
        return Account(self.name, self.uid, self.gid).run(*argv, stdin=stdin, timeout_s=timeout_s)


_clocks: dict[Path, Clock] = {}  # data_dir → the clock of the PostgreSQL in it


def use_clock(data_dir: Path, clock: Clock | None) -> None:
    """Make the PostgreSQL in `data_dir` use `clock` from its next start on; None stands for the machine's clock."""
    if clock is None:
        _clocks.pop(data_dir, None)
        return
    _clocks[data_dir] = clock
    setattr(embedded, "prepare", _prepare)  # noqa: B010 - mypy: it is an import there


def _prepare(data_dir: Path) -> tuple[Account, Path]:
    account, folder = pg_account.prepare(data_dir)
    clock = _clocks.get(data_dir)
    return (account if clock is None else _AccountWithClock(account.name, account.uid, account.gid, clock)), folder


def remove_files(pid: int) -> None:
    """Remove the files that the library has created for that process."""
    for name in _FILES_OF_PROCESS:
        Path("/dev/shm", name.format(pid)).unlink(missing_ok=True)
