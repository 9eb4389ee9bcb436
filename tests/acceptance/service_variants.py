"""`python -m tests.acceptance.service_variants NAME serve` runs `nexhb serve` with limits short enough for a test. In
the variant `hangs-once`, the writer also hangs for ever in its first batch, unless the file $HUNG_ALREADY exists."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from nexhb import cli, daemon, service
from nexhb.ingest import connection, writer
from nexhb.ingest.intake import Ticket
from nexhb.ingest.writer import Writer


def _is_first_process() -> bool:
    mark = Path(os.environ["HUNG_ALREADY"])
    existed = mark.exists()
    mark.touch()
    return not existed


class HangsOnce(Writer):
    """A writer that hangs for ever in its first batch, but not if an earlier process has hung already."""

    async def _settle(self, tickets: list[Ticket]) -> None:
        if _is_first_process():
            await asyncio.Event().wait()
        await super()._settle(tickets)


def main() -> None:
    """Run nexhb with these limits, and in the variant that the first argument names."""
    writer.MAX_SILENT_S, writer.PROBE_S, connection.RECOVER_WAIT_S = 3.0, 0.5, 0.5
    service.EXTEND_EVERY_S = 0.2
    if sys.argv.pop(1) == "hangs-once":
        setattr(daemon, "Writer", HangsOnce)  # noqa: B010 - it is an import there, and no export
    cli.main()


if __name__ == "__main__":
    main()
