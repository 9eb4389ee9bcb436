"""`nexhb serve` with a clock that can be stepped: `python -m tests.faults.clock FILE serve` adds the number of hours in
FILE to the machine's clock."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from nexhb import cli, daemon
from nexhb.clock import DatabaseClock, system_now


class SteppedClock:
    """The machine's clock plus the number of hours that a file contains."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> datetime:
        hours = 0.0
        with suppress(OSError, ValueError):
            hours = float(self._file.read_text())
        return system_now() + timedelta(hours=hours)


def main() -> None:
    """Run nexhb with the stepped clock."""
    clock = DatabaseClock(SteppedClock(Path(sys.argv.pop(1))))
    setattr(daemon, "running", partial(daemon.running, now=clock))  # noqa: B010 - mypy: it is a function there
    cli.main()


if __name__ == "__main__":
    main()
