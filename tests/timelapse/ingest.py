"""The real ingest path (intake, writer, PostgreSQL). The responses to the devices are recorded in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from nexhb.heartbeat import Heartbeat
from nexhb.ingest.intake import Intake, Outcome
from nexhb.ingest.writer import Writer
from nexhb.postgres.connections import Database
from nexhb.readiness import Readiness
from tests.timelapse.fleet import Fleet
from tests.timelapse.ledger import Ledger

_BYTES = 500  # size of a heartbeat's body
_TIMEOUT_S = 30.0  # the agent's timeout


class Ingest:
    """The intake and the writer of one daemon."""

    def __init__(self, database: Database, fleet: Fleet, ledger: Ledger) -> None:
        self._database, self._fleet, self._ledger = database, fleet, ledger
        self._to_retry: list[Heartbeat] = []  # received 503: devices keep these and send them again
        self._start()

    def _start(self) -> None:
        readiness = Readiness()
        self._intake = Intake(readiness, max_items=100_000, max_bytes=1 << 30)
        self._writer = Writer(self._database, self._intake, readiness, batch_max=2_000)
        self._running = asyncio.create_task(self._writer.run(), name="writer")

    async def restart(self) -> None:
        """Replace the daemon by a new one with empty caches."""
        await self.stop()
        self._start()

    async def stop(self) -> None:
        """Drain the writer."""
        await self._writer.stop(_TIMEOUT_S)
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    async def send(self, heartbeats: Sequence[Heartbeat]) -> None:
        """Send these heartbeats and those that received 503 before, and record the responses."""
        sent, self._to_retry = [*self._to_retry, *heartbeats], []
        tickets = [self._intake.submit([heartbeat], _BYTES) for heartbeat in sent]
        async with asyncio.timeout(_TIMEOUT_S):
            verdicts = [verdict for ticket in tickets for verdict in await ticket]
        for heartbeat, verdict in zip(sent, verdicts, strict=True):
            self._ledger.record(heartbeat, verdict.outcome)
            if verdict.outcome is Outcome.WRITTEN:
                self._fleet.remember(heartbeat)
            elif verdict.outcome is Outcome.FAILED:
                self._to_retry.append(heartbeat)

    async def send_all(self) -> None:
        """Send until no device has to send a heartbeat again."""
        while self._to_retry:
            await self.send([])
