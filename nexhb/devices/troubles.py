"""The recent troubles of devices: the last refusal of each, and tokens that two kiosks share.

Each daemon keeps troubles in memory, up to a limit. It writes them to the database once a minute, apart from the
heartbeats, so that every daemon can report them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nexhb import log
from nexhb.devices.shared_tokens import Kiosk, SharedTokenDetector
from nexhb.devices.store import Device
from nexhb.errors import described
from nexhb.heartbeat import Heartbeat
from nexhb.postgres import sql
from nexhb.postgres.connections import Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.rate_limit import RateLimiter

_Q = sql.queries("troubles")
_log = log.get("troubles")

MAX_ENTRIES = 10_000  # limit of refusals, and of shared tokens; beyond it, the oldest are dropped
FLUSH_S = 60.0
LOG_AGAIN_S = 3600.0  # how often to log a device that keeps being refused for the same reason
LOG_BURST, LOGS_PER_S = 100, 1.0  # limits of the log of refusals, for all devices together
MAX_REASON = 300  # length at which a reason is cut, in characters


@dataclass
class _Refusal:
    device_no: int
    at: datetime
    status: int
    reason: str
    field: str | None
    logged_at: float  # monotonic time, s
    is_written: bool = False

    def shown(self) -> dict[str, Any]:
        return {"at": self.at, "status": self.status, "reason": self.reason, "field": self.field}


@dataclass
class _Shared:
    device_no: int
    since: datetime
    last_at: datetime
    evidence: list[dict[str, str | None]]
    is_written: bool = False


class Troubles:
    """The troubles that one daemon has seen."""

    def __init__(self, database: Database, now: Callable[[], datetime], bucket_seconds: int) -> None:
        self._database = database
        self._now = now
        self._bucket_seconds = bucket_seconds
        self._shared_tokens = SharedTokenDetector(bucket_seconds)
        self._refusals: dict[str, _Refusal] = {}
        self._shared: dict[str, _Shared] = {}
        self._logs: RateLimiter = RateLimiter(burst=LOG_BURST, per_second=LOGS_PER_S)
        self._not_logged = 0

    def forget(self) -> None:
        """Drop all entries: the database was replaced, and their device numbers belong to the previous one."""
        self._shared_tokens = SharedTokenDetector(self._bucket_seconds)
        self._refusals.clear()
        self._shared.clear()

    def refused(self, device: Device, status: int, reason: str, field: str | None = None) -> None:
        """Record that a device's request, or one heartbeat of its queue, was refused. Log it once for each device,
        status and field, and again after an hour."""
        before = self._refusals.pop(device.device_id, None)
        now_s = time.monotonic()
        logged_at = before.logged_at if before and (before.status, before.field) == (status, field) else float("-inf")
        if now_s - logged_at > LOG_AGAIN_S:
            logged_at = now_s
            self._log_refusal(device, status, reason, field)
        self._refusals[device.device_id] = _Refusal(
            device.device_no, self._now(), status, reason[:MAX_REASON], field, logged_at
        )
        if len(self._refusals) > MAX_ENTRIES:
            del self._refusals[next(iter(self._refusals))]

    def look(self, heartbeat: Heartbeat) -> None:
        """Detect whether two kiosks send with one token, and log this once for each device."""
        if pair := self._shared_tokens.check(heartbeat):
            self._note(heartbeat, pair)

    def last_refusal(self, device_id: str) -> dict[str, Any] | None:
        """Return the device's last refusal by this daemon; None if there was no refusal."""
        refusal = self._refusals.get(device_id)
        return refusal.shown() if refusal else None

    def token_shared(self, device_id: str) -> dict[str, Any] | None:
        """Return when, and by which kiosks, this daemon saw the token shared; None if the token is not shared."""
        shared = self._shared.get(device_id)
        return {"since": shared.since, "last_at": shared.last_at, "kiosks": shared.evidence} if shared else None

    async def run(self) -> None:
        """Write new entries to the database once a minute. Never returns."""
        while True:
            await asyncio.sleep(FLUSH_S)
            if self._not_logged:
                _log.warning("device.refusals_not_logged", count=self._not_logged)
                self._not_logged = 0
            try:
                await self.flush()
            except (
                FROM_THE_DATABASE
            ) as error:  # the writer reports that the database is down; the next flush writes the entries
                _log.info("troubles.not_written", error=described(error))

    async def flush(self) -> None:
        """Write the entries that are not in the database yet. Raises the database's errors."""
        entries: list[_Refusal | _Shared] = [*self._refusals.values(), *self._shared.values()]
        if all(entry.is_written for entry in entries):
            return
        async with self._database.connected(application="nexhb troubles", command_timeout_s=10) as conn:
            # Read only after connecting: if the connection reaches another database, all entries are cleared.
            refusals = [refusal for refusal in self._refusals.values() if not refusal.is_written]
            shared = [pair for pair in self._shared.values() if not pair.is_written]
            rows = [(r.device_no, r.at, r.status, r.reason, r.field) for r in refusals]
            if rows:
                await conn.execute(_Q["write_refusals"], *map(list, zip(*rows, strict=True)))
            pairs = [(s.device_no, s.since, s.last_at, json.dumps(s.evidence)) for s in shared]
            if pairs:
                await conn.execute(_Q["write_shared"], *map(list, zip(*pairs, strict=True)))
        for refusal in refusals:
            refusal.is_written = True
        for pair in shared:
            pair.is_written = True

    def _log_refusal(self, device: Device, status: int, reason: str, field: str | None) -> None:
        if not self._logs.acquire("", time.monotonic()).allowed:
            self._not_logged += 1
            return
        _log.warning("device.refused", device_id=device.device_id, status=status, reason=reason, field=field)

    def _note(self, heartbeat: Heartbeat, pair: tuple[Kiosk, Kiosk]) -> None:
        now = self._now()
        before = self._shared.pop(heartbeat.device_id, None)
        evidence = [kiosk.shown() for kiosk in pair]
        if before is None:
            _log.warning("device.token_shared", device_id=heartbeat.device_id, kiosks=evidence)
            before = _Shared(heartbeat.device_no, now, now, evidence)
        self._shared[heartbeat.device_id] = _Shared(heartbeat.device_no, before.since, now, evidence)
        if len(self._shared) > MAX_ENTRIES:
            del self._shared[next(iter(self._shared))]
