"""Messages in a simulation: the real teller, the real delivery, and a receiver on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.sim.script import ROUTES, ZONE, Route, Script
from nexhb.config import NotifySettings, RouteSettings, Settings
from nexhb.messages import channels
from nexhb.messages.channels import Channels
from nexhb.messages.delivery import Delivery
from nexhb.messages.own_outage import OwnOutage
from nexhb.messages.routes import routes_of
from nexhb.messages.telling import Teller
from nexhb.postgres.connections import Connection, Database
from nexhb.readiness import Readiness, Source
from tests.support.receiver import Receiver, receiving

ADD_SILENCE = (
    'INSERT INTO silences (scope, value, "from", until, reason, created_by, created_at)'
    " VALUES ($1, $2, $3, $4, 'script', 'script', $3)"
)


class _Teller(Teller):
    """A teller that counts its messages."""

    messages = 0

    async def tell(self, conn: Connection, now: datetime) -> int:
        told = await super().tell(conn, now)
        self.messages += told
        return told


class Voice:
    """Puts messages into the outbox, delivers them, and records what was received."""

    def __init__(self, receiver: Receiver, opened: Channels, folder: Path, now: Callable[[], datetime]) -> None:
        self.receiver = receiver
        self.readiness = Readiness()
        self.teller = _Teller(tuple(opened.routes.values()), self.readiness)
        self._own = OwnOutage(self.readiness, opened, folder, now)
        self._now = now
        self._delivered = 0

    def set_disk(self, script: Script) -> None:
        """Let the disk be almost full, if it is so in the script."""
        now = (self._now() - script.start).total_seconds()
        is_full = any(start <= now < end for start, end in script.disk)
        self.readiness.set(Source.DISK, "the disk is almost full" if is_full else "")

    async def delivered(self, conn: Connection) -> None:
        """Wait until every message of the outbox was delivered."""
        if self.teller.messages == self._delivered:
            return
        self._delivered = self.teller.messages
        waiting = "SELECT EXISTS (SELECT FROM notifications WHERE delivered_at IS NULL)"
        while await conn.fetchval(waiting):  # noqa: ASYNC110 - the delivery has a connection of its own
            await asyncio.sleep(0.001)

    async def outage(self, *, is_down: bool, told: int = 0) -> None:
        """Note that nexhb accepts no heartbeats now, or does again. Wait for `told` messages about it."""
        self._own.check()  # as it does each second
        self.readiness.set(Source.DATABASE, "its database is away" if is_down else "")
        before = len(self.receiver.messages)
        self._own.check()
        await self.receiver.count(before + told)


@asynccontextmanager
async def speaking(database: Database, now: Callable[[], datetime]) -> AsyncIterator[Voice]:
    """Deliver messages for the block."""
    async with receiving() as receiver:
        notify = NotifySettings(routes=[_settings(receiver, route) for route in ROUTES])
        async with channels.opened(routes_of(Settings(notify=notify)), lambda: datetime.now(UTC)) as opened:
            delivery = asyncio.create_task(Delivery(database, opened, now).run())
            try:
                with TemporaryDirectory() as folder:
                    yield Voice(receiver, opened, Path(folder), now)
            finally:
                delivery.cancel()
                await asyncio.gather(delivery, return_exceptions=True)


def _settings(receiver: Receiver, route: Route) -> RouteSettings:
    match = {
        "kinds": route.kinds, "severity": route.severity, "sites": route.sites, "tags": [route.tag] if route.tag else []
    }  # fmt: skip
    quiet = f"{route.quiet[0]:02d}:00-{route.quiet[1]:02d}:00" if route.quiet else None
    return receiver.route(
        route.name, match=match, self=route.for_nexhb, quiet_hours=quiet, quiet_zone=ZONE,
        reminder_seconds=int(route.reminder),
    )  # fmt: skip
