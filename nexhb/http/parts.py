"""What handlers work with, put together by the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from aiohttp import web

from nexhb import wire
from nexhb.errors import DatabaseUnavailable
from nexhb.http.problem import Problem, dumps
from nexhb.http.quick import QuickAnswer

if TYPE_CHECKING:
    from nexhb.config import Settings
    from nexhb.db import Connection, Database
    from nexhb.devices import DeviceStore
    from nexhb.http.auth import AdminKey
    from nexhb.intake import Intake
    from nexhb.jobs.board import Jobs
    from nexhb.reads import Reads


@dataclass(frozen=True)
class Parts:
    """One of each; handlers find them in the application."""

    settings: Settings
    database: Database
    devices: DeviceStore
    intake: Intake
    reads: Reads
    jobs: Jobs
    admin: AdminKey
    now: Callable[[], datetime]  # UTC
    not_ready: Callable[[], list[str]]  # reasons; empty while heartbeats can be committed
    rules: wire.Rules = field(init=False)
    written: QuickAnswer = field(init=False)
    deduplicated: QuickAnswer = field(init=False)

    def __post_init__(self) -> None:
        """What every heartbeat needs and no heartbeat changes."""
        ingest, heartbeat = self.settings.ingest, self.settings.heartbeat
        rules = wire.Rules(heartbeat.unity_package, ingest.bucket_seconds, ingest.accept_past, ingest.accept_future)
        object.__setattr__(self, "rules", rules)
        for name, deduplicated in (("written", False), ("deduplicated", True)):
            value = {
                "ok": True,
                "next_heartbeat_seconds": heartbeat.interval_seconds,
                "deduplicated": deduplicated,
            }
            object.__setattr__(self, name, QuickAnswer(dumps(value)))


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)


@asynccontextmanager
async def writable_connection(parts: Parts) -> AsyncIterator[Connection]:
    """A connection of one's own for a rare change. Raises a 503 Problem where there is none."""
    try:
        conn = await parts.database.connect(application="nexhb http", command_timeout_s=10, lock_timeout="3000")
    except DatabaseUnavailable as error:
        raise Problem(503, str(error), headers={"Retry-After": "5"}) from error
    try:
        yield conn
    finally:
        await conn.close(timeout=5)
