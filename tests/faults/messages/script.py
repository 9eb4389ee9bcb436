"""The script of a run: kiosks whose batteries and apps fail, so that incidents open, widen and are resolved; and which
messages these incidents require."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import aiohttp
import asyncpg

from nexhb.postgres.errors import FROM_THE_DATABASE

POLL_S = 0.15
BUCKET_S = 1.0  # ingest.bucket_seconds: a kiosk's heartbeats are further apart
ROUNDS_PER_SITE = 2  # four changes of an app; after six within an hour, a kiosk would be flapping
KIOSKS_PER_SITE = 3
OPENED, WIDENED, RESOLVED = "opened", "widened", "resolved"


class Seen(NamedTuple):
    """An incident as the database shows it, with what all routes were told of it."""

    incident_id: int
    place: str  # the device or the site
    scope: str
    is_told: bool  # of its present scope
    is_over: bool  # and every route was told so


class Incidents:
    """Follows the incidents in the database while it is there."""

    def __init__(self, dsn: str, routes: int) -> None:
        self._dsn = dsn
        self._routes = routes
        self._seen: dict[int, Seen] = {}
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        """Read the incidents again and again until cancelled."""
        while True:
            with suppress(*FROM_THE_DATABASE):
                conn = await asyncpg.connect(self._dsn, timeout=3, command_timeout=3)
                try:
                    while True:
                        await self._read(conn)
                        await asyncio.sleep(POLL_S)
                finally:
                    conn.terminate()
            await asyncio.sleep(POLL_S)

    async def _read(self, conn: Any) -> None:
        rows = await conn.fetch(_INCIDENTS, self._routes)
        async with self._changed:
            self._seen = {row["incident_id"]: Seen(*row.values()) for row in rows}
            self._changed.notify_all()

    async def told(self, places: Sequence[str], scope: str) -> int:
        """Wait until an open incident of one of these places has this scope, and all routes were told of it; return its
        number."""
        return (await self._first(lambda one: one.place in places and one.scope == scope and one.is_told)).incident_id

    async def over(self, incident_id: int) -> None:
        """Wait until all routes were told of the end of an incident."""
        await self._first(lambda one: one.incident_id == incident_id and one.is_over)

    async def _first(self, condition: Any) -> Seen:
        async with self._changed:
            while True:
                for one in self._seen.values():
                    if condition(one):
                        return one
                await self._changed.wait()


_INCIDENTS = """
SELECT i.incident_id, coalesce(d.device_id, i.site, '') AS place, i.scope,
       i.resolved_at IS NULL AND (SELECT count(*) = $1 FROM incident_routes r
                                  WHERE r.incident_id = i.incident_id AND r.scope = i.scope) AS is_told,
       i.resolved_at IS NOT NULL AND (SELECT count(*) = $1 FROM incident_routes r
                                      WHERE r.incident_id = i.incident_id AND r.resolved_at IS NOT NULL) AS is_over
FROM incidents i LEFT JOIN devices d USING (device_no)
"""


@dataclass
class Kiosk:
    """A kiosk that sends a heartbeat until it is accepted."""

    device_id: str
    token: str
    url: str
    sent_at: float = 0.0

    async def send(self, http: aiohttp.ClientSession, *, battery: int = 80, is_unity_running: bool = True) -> None:
        """Send a heartbeat with this content, in a bucket of its own."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self.sent_at + BUCKET_S * 1.1 - loop.time()))
        self.sent_at = loop.time()
        body = {
            "device_id": self.device_id,
            "timestamp_utc": datetime.now(UTC).isoformat(),
            "battery": {"pct": battery, "charging": False},
            "app_versions": {"io.unitynodes.unityapp": {"installed": True, "version_name": "2.1.0"}},
            "unity_process_running": is_unity_running,
        }
        headers = {"Authorization": f"Bearer {self.token}"}
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with http.post(f"{self.url}/v1/heartbeat", json=body, headers=headers) as response:
                    if response.status == 200:
                        return
                    if response.status < 500:
                        raise AssertionError(f"{response.status}: {await response.text()}")
            await asyncio.sleep(0.2)


@dataclass
class Script:
    """What happens to the kiosks, and the messages about each incident that every route must receive."""

    incidents: Incidents
    http: aiohttp.ClientSession
    rng: random.Random
    required: dict[int, tuple[str, ...]] = field(default_factory=dict)
    stopping: bool = False

    async def battery(self, kiosk: Kiosk) -> None:
        """Let the battery of a kiosk become low and be charged, again and again."""
        await kiosk.send(self.http)
        while not self.stopping:
            await self._pause()
            await kiosk.send(self.http, battery=5)
            number = await self.incidents.told([kiosk.device_id], "device")
            self.required[number] = (OPENED, RESOLVED)
            await self._pause()
            await kiosk.send(self.http, battery=80)
            await self.incidents.over(number)

    async def sites(self, sites: Mapping[str, Sequence[Kiosk]]) -> None:
        """Let the app fail on one kiosk of a site, then on all; then run again. One site after the other."""
        for site, kiosks in sites.items():
            for kiosk in kiosks:
                await kiosk.send(self.http)
            for _ in range(ROUNDS_PER_SITE):
                if self.stopping:
                    return
                await self._fail_at_site(site, kiosks)

    async def _fail_at_site(self, site: str, kiosks: Sequence[Kiosk]) -> None:
        await kiosks[0].send(self.http, is_unity_running=False)
        number = await self.incidents.told([kiosks[0].device_id], "device")
        await self._pause()
        for kiosk in kiosks[1:]:
            await kiosk.send(self.http, is_unity_running=False)
        number = await self.incidents.told([site], "site")
        self.required[number] = (OPENED, WIDENED, RESOLVED)
        await self._pause()
        await asyncio.gather(*(kiosk.send(self.http) for kiosk in kiosks))
        await self.incidents.over(number)

    async def _pause(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 1.5))
