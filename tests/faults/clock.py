"""`nexhb serve` whose clock can be stepped: `python -m tests.faults.clock FILE serve` adds the hours that FILE says."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from nexhb import cli, daemon
from nexhb.clock import DatabaseClock


class Stepped:
    """The machine's clock, and what a file says on top of it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> datetime:
        hours = 0.0
        with suppress(OSError, ValueError):
            hours = float(self._file.read_text())
        return daemon.utc_now() + timedelta(hours=hours)


def main() -> None:
    """Run nexhb by that clock."""
    clock = DatabaseClock(Stepped(Path(sys.argv.pop(1))))
    setattr(daemon, "running", partial(daemon.running, now=clock))  # noqa: B010 - mypy: it is a function there
    cli.main()


if __name__ == "__main__":
    main()
