"""The time-lapse, cut down to seconds: weeks instead of months, kept for days, with more faults a night. `make
timelapse` is the whole of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from nexhb import log
from nexhb.db import Database
from tests.timelapse.days import live
from tests.timelapse.kills import DAY_POINTS
from tests.timelapse.nights import CARDS
from tests.timelapse.report import missing
from tests.timelapse.world import Settings

POINTS = [f'killed at "{point}"' for point in DAY_POINTS]
SHORT = Settings(
    days=20,
    retention_days=8,
    step=timedelta(hours=3),
    faulty_nights=1.0,
    faults_a_night=4,
    shortened=1.0,
    missed_weeks=0,
)


async def test_after_weeks_of_faults_every_heartbeat_is_there_once_and_every_day_where_it_belongs(
    database: Database, tmp_path: Path
) -> None:
    log.setup("critical")  # what goes wrong here goes wrong on purpose
    world, found = await live(SHORT, database.dsn, tmp_path, lambda _: None)
    assert [line for check in found for line in check.wrong] == []
    never = missing(world)
    assert [name for name in never if name in POINTS] == []
    assert len(never) < len(CARDS) / 10, never  # chance deals the cards; in `make timelapse` each has its turn
