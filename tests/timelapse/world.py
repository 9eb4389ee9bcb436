"""The world of a time-lapse: a database, an archive, a fleet, and a clock that is moved by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

from nexhb import devices
from nexhb.archive.export import export
from nexhb.db import Connection
from nexhb.jobs import plan
from tests.timelapse.database import WatchedDatabase
from tests.timelapse.fleet import WINDOW, Device, Fleet
from tests.timelapse.ingest import Ingest
from tests.timelapse.ledger import Ledger
from tests.timelapse.store import UnreliableStore

# In the past: the writer does not believe a status that lies ahead of the database's own clock.
START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS_AHEAD = 14
NIGHT = timedelta(hours=3)


@dataclass(frozen=True)
class Settings:
    """One time-lapse."""

    seed: int = 1
    days: int = 200
    retention_days: int = 90
    devices: int = 20
    step: timedelta = timedelta(hours=1)  # between two rounds of heartbeats, each with its reconciliation
    faulty_nights: float = 0.9  # of all nights
    faults_a_night: int = 2  # at most
    shortened: float = 0.3  # of the faults that find no day to be archived: one is made so
    missed_weeks: int = 2

    @property
    def end(self) -> datetime:
        """The last night."""
        return START + timedelta(days=self.days) + NIGHT

    @property
    def short_until(self) -> datetime:
        """A day that is let go too early until then is too old to be missed at the end."""
        return self.end - timedelta(days=self.retention_days)

    def rules(self, retention_days: int | None = None) -> plan.Rules:
        """As the settings of nexhb say, or with what an operator wants to keep tonight."""
        return plan.Rules(
            retention_days=retention_days or self.retention_days, days_ahead=DAYS_AHEAD, accept_past=WINDOW
        )


@dataclass
class World:
    """Everything there is."""

    settings: Settings
    database: WatchedDatabase
    conn: Connection  # our own
    store: UnreliableStore
    spool: Path
    fleet: Fleet
    ledger: Ledger
    ingest: Ingest
    rng: random.Random
    now: datetime = START
    playing: str = ""  # the fault that is on
    faults: Counter[str] = field(default_factory=Counter)  # how often each was met
    done: Counter[str] = field(default_factory=Counter)  # what the jobs say that they did
    restored: dict[date, datetime] = field(default_factory=dict)  # days that are back, and when they are released
    asleep_until: datetime = START  # no jobs before
    inactive_before: datetime = START  # devices last heard before were called inactive by some run


@asynccontextmanager
async def living(settings: Settings, dsn: str, folder: Path) -> AsyncIterator[World]:
    """A world at its beginning; `dsn` names a database with the schema and nothing in it."""
    database = WatchedDatabase(dsn)
    conn = await database.connect(application="timelapse")
    rng = random.Random(settings.seed)
    fleet = Fleet(await _devices(conn, settings), random.Random(rng.random()))
    ledger = Ledger()
    ingest = Ingest(database, fleet, ledger)
    cut = partial(export, object_bytes=0)  # an object for each piece of the stream: a day has one to eight
    try:
        with patch("nexhb.jobs.nightly.export", cut), patch("nexhb.archive.late.export", cut):
            store = UnreliableStore(folder / "archive")
            yield World(settings, database, conn, store, folder / "spool", fleet, ledger, ingest, rng)
    finally:
        await ingest.stop()
        conn.terminate()


async def _devices(conn: Connection, settings: Settings) -> list[Device]:
    """Three of them fall silent for longer than the retention: two come back, one never."""
    made = []
    retention = timedelta(days=settings.retention_days)
    for number in range(1, settings.devices + 1):
        device_id = f"kiosk-{number}" if number > 2 else f'kiosk "{number}", Café'
        await devices.add(conn, device_id, None)
        made.append(Device(await conn.fetchval("SELECT max(device_no) FROM devices"), device_id))
    first = START + timedelta(days=2)
    for device, begins, lasts in (
        (made[-1], first, retention + timedelta(days=9)),
        (made[-2], first + timedelta(days=3, hours=7), retention + timedelta(days=8, hours=9)),
        (made[-3], first + timedelta(hours=11), timedelta(days=10_000)),
    ):
        device.silent = (begins, begins + lasts)
    return made
