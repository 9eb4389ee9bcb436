"""`python -m tests.acceptance.service_variants NAME serve` is `nexhb serve` with bounds that a test can wait for and,
as `hangs-once`, a writer that waits for ever at its first batch, unless the file $HUNG_ALREADY is there."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from nexhb import cli, daemon, writer
from nexhb.intake import Ticket
from nexhb.writer import Writer


def _first() -> bool:
    mark = Path(os.environ["HUNG_ALREADY"])
    was_there = mark.exists()
    mark.touch()
    return not was_there


class HangsOnce(Writer):
    """Takes a batch, and is never heard of again; the next process has another."""

    async def _write(self, tickets: list[Ticket]) -> None:
        if _first():
            await asyncio.Event().wait()
        await super()._write(tickets)


def main() -> None:
    """Run nexhb so."""
    writer.SILENT_MOST_S, writer.PROBE_S, writer.RECOVER_WAIT_S = 3.0, 0.5, 0.5
    daemon.ASK_S = 0.2
    if sys.argv.pop(1) == "hangs-once":
        setattr(daemon, "Writer", HangsOnce)  # noqa: B010 - it is an import there, and no export
    cli.main()


if __name__ == "__main__":
    main()
