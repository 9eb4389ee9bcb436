"""A small fleet whose clock the test moves, with the watcher's rounds in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from nexhb.config import WatchSettings
from nexhb.messages.routes import routes_of
from nexhb.messages.telling import Teller
from nexhb.postgres.connections import Connection
from nexhb.postgres.locks import Lock
from nexhb.readiness import Readiness
from nexhb.watching.judging import watch_rules
from nexhb.watching.watcher import Watcher
from tests.conftest import Agent, Nexhb, StartDaemon

MINUTE = timedelta(minutes=1)
UPTIME_S = 100_000.0


@dataclass
class Kiosk:
    """A device, and what its next heartbeats state."""

    agent: Agent
    booted_at: datetime
    changes: dict[str, Any] = field(default_factory=dict)

    def body(self, at: datetime) -> dict[str, Any]:
        """Return what differs from the example in a heartbeat made at `at`."""
        uptime_s = (at - self.booted_at).total_seconds()
        return {"system": {"uptime_seconds": uptime_s, "model": "SM-T500"}} | self.changes


@dataclass
class Watched:
    """A daemon, its kiosks, and a watcher whose rounds the test runs."""

    nexhb: Nexhb
    conn: Connection
    now: datetime
    kiosks: dict[str, Kiosk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nexhb.clock.fixed = self.now
        self.rules = watch_rules(self.nexhb.settings)
        clock = self.nexhb.clock
        self.watcher = Watcher(
            self.nexhb.database, self.rules, 10, clock, monotonic=lambda: clock().timestamp(),
            tell=Teller(routes_of(self.nexhb.settings), Readiness()),
        )  # fmt: skip

    @classmethod
    async def start(cls, start_daemon: StartDaemon, conn: Connection, now: datetime, **settings: Any) -> Watched:
        """Start a daemon without kiosks and run the first round. The daemon itself runs no rounds, because `conn` holds
        the watcher's lock."""
        assert await conn.fetchval("SELECT pg_try_advisory_lock($1)", int(Lock.WATCH))
        nexhb = await start_daemon(watch=WatchSettings(interval_seconds=60), now=now, **settings)
        watched = cls(nexhb, conn, now)
        await watched.round()
        return watched

    async def add(self, *device_ids: str, site: str | None = None) -> None:
        """Add kiosks to the fleet, and to a site."""
        for device_id in device_ids:
            self.kiosks[device_id] = Kiosk(await self.nexhb.agent(device_id), self.now - timedelta(seconds=UPTIME_S))
        created = "UPDATE devices SET created_at = $1 WHERE device_id = ANY($2)"
        await self.conn.execute(created, self.now, list(device_ids))
        if site is not None:
            await self.conn.execute("INSERT INTO sites (site) VALUES ($1) ON CONFLICT DO NOTHING", site)
            await self.conn.execute("UPDATE devices SET site = $1 WHERE device_id = ANY($2)", site, list(device_ids))

    async def minutes(self, count: int, silent: Sequence[str] = ()) -> None:
        """Let the kiosks send a heartbeat each minute, except the silent ones; a round follows each minute."""
        for _ in range(count):
            self.now += MINUTE
            self.nexhb.clock.fixed = self.now
            for device_id, kiosk in self.kiosks.items():
                if device_id not in silent:
                    assert (await kiosk.agent.send(self.now, **kiosk.body(self.now))).status == 200
            await self.round()

    async def round(self) -> None:
        """Run a round."""
        await self.watcher.round(self.conn)

    async def events(self) -> list[tuple[str, str, str | None]]:
        """Return the events: device, kind, cause."""
        rows = await self.conn.fetch(
            "SELECT device_id, kind, cause FROM device_events JOIN devices USING (device_no) ORDER BY event_id"
        )
        return [tuple(row) for row in rows]

    async def incidents(self) -> list[tuple[Any, ...]]:
        """Return the incidents: kind, scope, site, cause, devices, whether it is resolved."""
        rows = await self.conn.fetch(
            "SELECT kind, scope, site, cause, devices, resolved_at IS NOT NULL FROM incidents ORDER BY incident_id"
        )
        return [tuple(row) for row in rows]
