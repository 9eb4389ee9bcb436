"""A time-lapse that takes seconds: it simulates weeks instead of months, with a retention of days and more faults per
night. `make timelapse` runs the full time-lapse."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from nexhb import log
from nexhb.postgres.connections import Database
from tests.timelapse.days import live
from tests.timelapse.kills import DAY_POINTS
from tests.timelapse.nights import KINDS
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


async def test_after_weeks_of_faults_every_heartbeat_is_stored_once_in_a_partition_or_an_archive(
    database: Database, tmp_path: Path
) -> None:
    log.setup("critical")  # the errors in this log are caused on purpose
    world, results = await live(SHORT, database.dsn, tmp_path, lambda _: None)
    assert [line for check in results for line in check.wrong] == []
    never = missing(world)
    assert [name for name in never if name in POINTS] == []
    assert len(never) < len(KINDS) / 10, never  # few nights: some random kinds of faults may not occur
