"""The simulated world: a database, an archive, a fleet, and a clock that the time-lapse advances."""

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

from nexhb.archive.export import export
from nexhb.devices import registry
from nexhb.jobs import plan
from nexhb.postgres.connections import Connection
from tests.timelapse.database import WatchedDatabase
from tests.timelapse.fleet import WINDOW, Device, Fleet
from tests.timelapse.ingest import Ingest
from tests.timelapse.ledger import Ledger
from tests.timelapse.store import UnreliableStore

# In the past, because the writer rejects last statuses that are later than the database's clock.
START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS_AHEAD = 14
NIGHT = timedelta(hours=3)


@dataclass(frozen=True)
class Settings:
    """The settings of one time-lapse."""

    seed: int = 1
    days: int = 200
    retention_days: int = 90
    devices: int = 20
    step: timedelta = timedelta(hours=1)  # between two rounds of heartbeats, each followed by a reconciliation
    faulty_nights: float = 0.9  # share of all nights
    faults_a_night: int = 2  # the maximum
    shortened: float = 0.3  # share of the faults before which the retention is shortened if no day is due
    missed_weeks: int = 2

    @property
    def end(self) -> datetime:
        """Return the time of the last night."""
        return START + timedelta(days=self.days) + NIGHT

    @property
    def short_until(self) -> datetime:
        """Return the time until which a night may use a retention that is too short. A day that such a night archives
        too early is older than the real retention at the end, so that it belongs in the archive in any case."""
        return self.end - timedelta(days=self.retention_days)

    def rules(self, retention_days: int | None = None) -> plan.NightlyRules:
        """Return the rules according to nexhb's settings, with `retention_days` in place of the retention if given."""
        return plan.NightlyRules(
            retention_days=retention_days or self.retention_days, days_ahead=DAYS_AHEAD, accept_past=WINDOW
        )


@dataclass
class World:
    """Everything in a simulation."""

    settings: Settings
    database: WatchedDatabase
    conn: Connection  # connection of the time-lapse itself
    store: UnreliableStore
    spool: Path
    fleet: Fleet
    ledger: Ledger
    ingest: Ingest
    rng: random.Random
    now: datetime = START
    current_fault: str = ""  # the active fault
    faults: Counter[str] = field(default_factory=Counter)  # the number of times that each fault happened
    done: Counter[str] = field(default_factory=Counter)  # the sums of the jobs' counts
    restored: dict[date, datetime] = field(default_factory=dict)  # restored days, and when they are released
    paused_until: datetime = START  # no jobs before this time
    inactive_before: datetime = START  # a run may have marked devices that were last seen earlier


@asynccontextmanager
async def living(settings: Settings, dsn: str, folder: Path) -> AsyncIterator[World]:
    """Create a world. `dsn` leads to a database with the schema and no rows."""
    database = WatchedDatabase(dsn)
    conn = await database.connect(application="timelapse")
    rng = random.Random(settings.seed)
    fleet = Fleet(await _devices(conn, settings), random.Random(rng.random()))
    ledger = Ledger()
    ingest = Ingest(database, fleet, ledger)
    small_objects = partial(
        export, object_bytes=0
    )  # one object per piece of the stream, so that a day has one to eight
    try:
        with patch("nexhb.jobs.nightly.export", small_objects), patch("nexhb.archive.late.export", small_objects):
            store = UnreliableStore(folder / "archive")
            yield World(settings, database, conn, store, folder / "spool", fleet, ledger, ingest, rng)
    finally:
        await ingest.stop()
        conn.terminate()


async def _devices(conn: Connection, settings: Settings) -> list[Device]:
    """Create the devices. Three of them are silent for longer than the retention; two of the three send again later."""
    made = []
    retention = timedelta(days=settings.retention_days)
    for number in range(1, settings.devices + 1):
        device_id = f"kiosk-{number}" if number > 2 else f'kiosk "{number}", Café'
        await registry.add(conn, device_id, None)
        made.append(Device(await conn.fetchval("SELECT max(device_no) FROM devices"), device_id))
    first = START + timedelta(days=2)
    for device, begins, lasts in (
        (made[-1], first, retention + timedelta(days=9)),
        (made[-2], first + timedelta(days=3, hours=7), retention + timedelta(days=8, hours=9)),
        (made[-3], first + timedelta(hours=11), timedelta(days=10_000)),
    ):
        device.silent = (begins, begins + lasts)
    return made
