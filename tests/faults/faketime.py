"""A clock of its own for a run's PostgreSQL: libfaketime, where Debian's package is installed, adds to the time of day
what a file says. Monotonic time stays the machine's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from nexhb import embedded, pgaccount
from nexhb.pgaccount import Account

_EACH_PROCESS = ("faketime_shm_{}", "sem.faketime_sem_{}")  # which nobody removes behind one that was killed


def library() -> Path | None:
    """The library, where it is installed (apt-get install libfaketime)."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@dataclass(frozen=True)
class Clock:
    """How far a PostgreSQL's clock is ahead of the machine's."""

    file: Path
    library: Path

    def step(self, ahead: timedelta) -> None:
        """From now on by so much; every process of it sees that at once."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{ahead / timedelta(seconds=1):+.0f}")
        new.chmod(0o644)
        new.replace(self.file)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to go by it."""
        return {
            "LD_PRELOAD": str(self.library), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }  # fmt: skip


@dataclass(frozen=True)
class _Clocked(Account):
    """The account whose postmaster goes by that clock; what `run` runs goes by the machine's."""

    clock: Clock

    def popen(self, **env: str) -> dict[str, Any]:
        return super().popen(**env, **self.clock.environment)

    def run(self, *argv: str | Path, stdin: str = "", timeout_s: float = 60.0) -> str:
        return Account(self.name, self.uid, self.gid).run(*argv, stdin=stdin, timeout_s=timeout_s)


_clocks: dict[Path, Clock] = {}  # data_dir → whose


def goes_by(data_dir: Path, clock: Clock | None) -> None:
    """From its next start on the PostgreSQL in that folder goes by that clock; None: by the machine's."""
    if clock is None:
        _clocks.pop(data_dir, None)
        return
    _clocks[data_dir] = clock
    setattr(embedded, "prepare", _prepare)  # noqa: B010 - mypy: it is an import there


def _prepare(data_dir: Path) -> tuple[Account, Path]:
    account, found = pgaccount.prepare(data_dir)
    clock = _clocks.get(data_dir)
    return (account if clock is None else _Clocked(account.name, account.uid, account.gid, clock)), found


def clear_away(pid: int) -> None:
    """What the library has left of that process."""
    for name in _EACH_PROCESS:
        Path("/dev/shm", name.format(pid)).unlink(missing_ok=True)
