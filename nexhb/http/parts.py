"""What handlers work with, put together by the daemon."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from aiohttp import web

from nexhb import log, wire
from nexhb.errors import DatabaseUnavailable
from nexhb.http import pace
from nexhb.http.problem import Problem, dumps
from nexhb.http.quick import QuickAnswer
from nexhb.intake import DEDUPLICATED
from nexhb.pgerrors import reason
from nexhb.ratelimit import Allowance

if TYPE_CHECKING:
    from nexhb.config import Settings
    from nexhb.db import Connection, Database
    from nexhb.devices import Device, DeviceStore
    from nexhb.flags import FlagStore
    from nexhb.http.auth import AdminKey
    from nexhb.identity import Lives
    from nexhb.intake import Intake, Verdict
    from nexhb.jobs.board import Jobs
    from nexhb.legacy.adopt import Adoption
    from nexhb.perfdiff import PerfDiff
    from nexhb.reads import Answers, Reads
    from nexhb.troubles import Troubles

_log = log.get("http")

CHANGES_AT_ONCE = 4  # connections for registrations and the like; the embedded PostgreSQL has 60 for everybody
TURN_WITHIN_S = 10.0


@dataclass(frozen=True)
class Parts:
    """One of each; handlers find them in the application."""

    settings: Settings
    database: Database
    devices: DeviceStore
    adoption: Adoption
    intake: Intake
    reads: Reads
    legacy: Answers
    perf_diff: PerfDiff
    troubles: Troubles
    jobs: Jobs
    flags: FlagStore
    admin: AdminKey
    now: Callable[[], datetime]  # UTC
    not_ready: Callable[[bool], list[str]]  # reasons, in full for operators; empty while heartbeats can be committed
    lives: Lives  # which database this is
    rules: wire.Rules = field(init=False)
    failures: Allowance = field(init=False)  # wrong keys, by address
    device_rate: Allowance = field(init=False)  # heartbeats, by device_no
    logged: Allowance = field(init=False)  # lines about a database that is away
    refusals: pace.Turns = field(init=False)  # of an intake that admits nothing
    changes: asyncio.Semaphore = field(init=False)  # turns at a connection for changes
    queues: set[object] = field(init=False, default_factory=set)  # POST /v1/heartbeats under way
    _answers: dict[tuple[int, bool], QuickAnswer] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """What every heartbeat needs and no heartbeat changes."""
        ingest, heartbeat, auth = self.settings.ingest, self.settings.heartbeat, self.settings.auth
        rules = wire.Rules(heartbeat.unity_package, ingest.bucket_seconds, ingest.accept_past, ingest.accept_future)
        object.__setattr__(self, "rules", rules)
        failures = Allowance(burst=5 * auth.failures_per_minute, per_second=auth.failures_per_minute / 60)
        object.__setattr__(self, "failures", failures)
        device_rate = Allowance(burst=ingest.device_burst, per_second=ingest.device_per_minute / 60)
        object.__setattr__(self, "device_rate", device_rate)
        self.lives.on_change(device_rate.clear)  # its keys are device numbers
        object.__setattr__(self, "logged", Allowance(burst=5, per_second=0.2))
        turns = pace.Turns(per_s=pace.REFUSALS_PER_S, at_once=pace.REFUSALS_AT_ONCE, within_s=pace.REFUSAL_WITHIN_S)
        object.__setattr__(self, "refusals", turns)
        object.__setattr__(self, "changes", asyncio.Semaphore(CHANGES_AT_ONCE))

    def come_back(self, detail: str, *, close: bool = False) -> Problem:
        """A 503 that spreads those who hear it."""
        return Problem(503, detail, headers={"Retry-After": str(self.intake.retry_after_s())}, close=close)

    def unavailable(self, error: Exception) -> Problem:
        """A 503 for whoever asks, whether or not he has a key: the database's own words are in the log alone."""
        if not self.logged.take("", time.monotonic()):
            _log.warning("http.unavailable", error=f"{type(error).__name__}: {error}")
        if isinstance(error, MemoryError):
            return self.come_back("There is not enough memory.")
        return self.come_back(f"The database is not available: {reason(error)}.")

    def check_current(self, device: Device) -> None:
        """Raise a 503 Problem where the database was replaced since the device's token was looked up: its number may be
        another device's there."""
        if not self.devices.is_current(device):
            raise self.come_back("The database was replaced by another one.")

    def next_heartbeat_s(self) -> int:
        """When the device that is answered now should come again."""
        usual = self.settings.heartbeat.interval_seconds
        filled = self.intake.filled
        if filled <= pace.CALM:
            return usual
        return pace.interval_s(usual, self.settings.heartbeat.offline_after_seconds, filled, random.random())  # noqa: S311

    def answer_to(self, verdict: Verdict) -> QuickAnswer:
        """What a device hears whose heartbeat is committed. One for each interval there is: a few hundred at most."""
        key = (self.next_heartbeat_s(), verdict is DEDUPLICATED)
        found = self._answers.get(key)
        if found is None:
            value = {"ok": True, "next_heartbeat_seconds": key[0], "deduplicated": key[1]}
            found = self._answers.setdefault(key, QuickAnswer(dumps(value)))
        return found


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)


@asynccontextmanager
async def writable_connection(parts: Parts) -> AsyncIterator[Connection]:
    """A connection of one's own for a rare change. Raises a 503 Problem where there is none, or no turn in time: a
    fleet that registers at once must not take the connections of the writer."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(TURN_WITHIN_S):
                await stack.enter_async_context(parts.changes)
            connected = parts.database.connected(application="nexhb http", command_timeout_s=10, lock_timeout="3000")
            conn = await stack.enter_async_context(connected)
        except TimeoutError:
            raise parts.come_back("Too many changes at once.") from None
        except DatabaseUnavailable as error:
            raise parts.unavailable(error) from error
        yield conn
