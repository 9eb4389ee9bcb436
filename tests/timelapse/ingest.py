"""The heartbeats' real way in: intake, writer, PostgreSQL; and what a device heard, into the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from nexhb.db import Database
from nexhb.intake import Intake, Outcome
from nexhb.wire import Heartbeat
from nexhb.writer import Writer
from tests.timelapse.fleet import Fleet
from tests.timelapse.ledger import Ledger

_BYTES = 500  # of a heartbeat's body
_ANSWER_S = 30.0  # the agent's patience


class Ingest:
    """One daemon's intake and writer."""

    def __init__(self, database: Database, fleet: Fleet, ledger: Ledger) -> None:
        self._database, self._fleet, self._ledger = database, fleet, ledger
        self._unanswered: list[Heartbeat] = []  # heard 503: devices keep them, and send again
        self._start()

    def _start(self) -> None:
        self._intake = Intake(max_items=100_000, max_bytes=1 << 30)
        self._writer = Writer(self._database, self._intake, batch_max=2_000)
        self._running = asyncio.create_task(self._writer.run(), name="writer")

    async def restart(self) -> None:
        """Another daemon, which remembers nothing of what was written."""
        await self.stop()
        self._start()

    async def stop(self) -> None:
        """The writer is drained."""
        await self._writer.stop(_ANSWER_S)
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    async def send(self, heartbeats: Sequence[Heartbeat]) -> None:
        """Send them, and what was not taken the last time; write down the answers."""
        sent, self._unanswered = [*self._unanswered, *heartbeats], []
        answers = [self._intake.ask([heartbeat], _BYTES) for heartbeat in sent]
        async with asyncio.timeout(_ANSWER_S):
            verdicts = [verdict for answer in answers for verdict in await answer]
        for heartbeat, verdict in zip(sent, verdicts, strict=True):
            self._ledger.take(heartbeat, verdict.outcome)
            if verdict.outcome is Outcome.WRITTEN:
                self._fleet.remember(heartbeat)
            elif verdict.outcome is Outcome.FAILED:
                self._unanswered.append(heartbeat)

    async def send_all(self) -> None:
        """Until nothing is left that a device still holds."""
        while self._unanswered:
            await self.send([])
