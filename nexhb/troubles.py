"""What went wrong with a device lately: what it was last refused for, and whether two kiosks share its token.

In memory, bounded; written to the database once a minute, beside the heartbeats' way, so that whoever asks any daemon
about a device hears of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nexhb import log, sql
from nexhb.db import Database
from nexhb.devices import Device
from nexhb.pgerrors import FROM_THE_DATABASE
from nexhb.ratelimit import Allowance
from nexhb.twins import Kiosk, Twins
from nexhb.wire import Heartbeat

_Q = sql.queries("troubles")
_log = log.get("troubles")

HELD = 10_000  # devices with a refusal, and as many with a token that two share: the oldest are forgotten
FLUSH_S = 60.0
LOGGED_AGAIN_S = 3600.0  # a device that goes on being refused for the same
LOGS_AT_ONCE, LOGS_PER_S = 100, 1.0  # of all devices
REASON_MOST = 300  # characters


@dataclass
class _Refusal:
    device_no: int
    at: datetime
    status: int
    reason: str
    field: str | None
    logged_at: float  # s, of a clock that does not step
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
    """One daemon's."""

    def __init__(self, database: Database, now: Callable[[], datetime], bucket_seconds: int) -> None:
        self._database = database
        self._now = now
        self._bucket_seconds = bucket_seconds
        self._twins = Twins(bucket_seconds)
        self._refusals: dict[str, _Refusal] = {}
        self._shared: dict[str, _Shared] = {}
        self._logs: Allowance = Allowance(burst=LOGS_AT_ONCE, per_second=LOGS_PER_S)
        self._not_logged = 0

    def forget(self) -> None:
        """Another database is there: these numbers are devices of the one before."""
        self._twins = Twins(self._bucket_seconds)
        self._refusals.clear()
        self._shared.clear()

    def refused(self, device: Device, status: int, reason: str, field: str | None = None) -> None:
        """A device's request was refused, or one heartbeat of its queue. Logged once a device, status and field; again
        after an hour."""
        before = self._refusals.pop(device.device_id, None)
        moment = time.monotonic()
        logged_at = before.logged_at if before and (before.status, before.field) == (status, field) else float("-inf")
        if moment - logged_at > LOGGED_AGAIN_S:
            logged_at = moment
            self._say(device, status, reason, field)
        self._refusals[device.device_id] = _Refusal(
            device.device_no, self._now(), status, reason[:REASON_MOST], field, logged_at
        )
        if len(self._refusals) > HELD:
            del self._refusals[next(iter(self._refusals))]

    def look(self, heartbeat: Heartbeat) -> None:
        """Notice where two kiosks send with one token. Logged once a device."""
        if pair := self._twins.look(heartbeat):
            self._note(heartbeat, pair)

    def last_refusal(self, device_id: str) -> dict[str, Any] | None:
        """What this daemon saw; None where it saw none."""
        found = self._refusals.get(device_id)
        return found.shown() if found else None

    def token_shared(self, device_id: str) -> dict[str, Any] | None:
        """What this daemon saw; None where it saw none."""
        found = self._shared.get(device_id)
        return {"since": found.since, "last_at": found.last_at, "kiosks": found.evidence} if found else None

    async def run(self) -> None:
        """Write what is new, now and then. Never returns."""
        while True:
            await asyncio.sleep(FLUSH_S)
            if self._not_logged:
                _log.warning("device.refusals_not_logged", count=self._not_logged)
                self._not_logged = 0
            try:
                await self.flush()
            except FROM_THE_DATABASE as error:  # away: the writer says so, and this is written the next time
                _log.info("troubles.not_written", error=f"{type(error).__name__}: {error}")

    async def flush(self) -> None:
        """Write what is not written yet. Raises what the database raises."""
        if all(one.is_written for one in self._refusals.values()) and all(
            one.is_written for one in self._shared.values()
        ):
            return
        async with self._database.connected(application="nexhb troubles", command_timeout_s=10) as conn:
            # Not before: a connection that reaches another database has made us forget.
            refusals = [one for one in self._refusals.values() if not one.is_written]
            shared = [one for one in self._shared.values() if not one.is_written]
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

    def _say(self, device: Device, status: int, reason: str, field: str | None) -> None:
        if self._logs.take("", time.monotonic()):
            self._not_logged += 1
            return
        _log.warning("device.refused", device_id=device.device_id, status=status, reason=reason, field=field)

    def _note(self, heartbeat: Heartbeat, pair: tuple[Kiosk, Kiosk]) -> None:
        now = self._now()
        before = self._shared.pop(heartbeat.device_id, None)
        evidence = [one.shown() for one in pair]
        if before is None:
            _log.warning("device.token_shared", device_id=heartbeat.device_id, kiosks=evidence)
            before = _Shared(heartbeat.device_no, now, now, evidence)
        self._shared[heartbeat.device_id] = _Shared(heartbeat.device_no, before.since, now, evidence)
        if len(self._shared) > HELD:
            del self._shared[next(iter(self._shared))]
