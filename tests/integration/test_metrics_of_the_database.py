"""What /metrics says of the database, it reads there: other daemons and commands work on it too."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from nexhb import daemon, partitions
from nexhb.db import Connection, Database
from nexhb.jobs import board, runner, schedule
from tests.conftest import StartDaemon
from tests.integration.test_nightly import NOW, OLD, House

Value = Callable[..., float]


@pytest.fixture
def value() -> Value:
    """The value of a metric now."""

    def read(name: str, **labels: str) -> float:
        found = REGISTRY.get_sample_value(name, labels)
        assert found is not None, (name, labels)
        return found

    return read


async def test_a_job_that_never_did_its_work_is_0_and_not_left_out(conn: Connection, value: Value) -> None:
    await schedule.show(conn, NOW)
    for job in ("nightly", "reconcile"):
        assert value("nexhb_job_last_success_timestamp_seconds", job=job) == 0


async def test_what_other_daemons_did_is_shown(
    database: Database, conn: Connection, tmp_path: Path, value: Value
) -> None:
    house = House(database, conn, tmp_path)
    await house.fill(OLD)
    await house.fill(OLD - timedelta(days=1))
    house.store.refuse = "0000"
    assert (await house.nightly()).status == "failed"
    await schedule.show(conn, NOW)
    assert value("nexhb_partitions", state="archive_failed") == 2
    assert value("nexhb_partitions", state="dropped") == 0
    assert value("nexhb_job_last_success_timestamp_seconds", job="nightly") == 0

    house.store.refuse = ""
    assert (await house.nightly()).status == "completed"
    await house.fill(NOW.date(), devices=4, rows=5)
    await runner.run(database, board.reconcile_job(), NOW)
    await runner.run(database, board.reconcile_job(), NOW)  # the last run is what counts: nothing is wrong any more
    await schedule.show(conn, NOW)
    assert value("nexhb_partitions", state="archive_failed") == 0
    assert value("nexhb_partitions", state="dropped") == 2
    assert value("nexhb_reconciliation_drift_ratio") == 0
    assert value("nexhb_last_restore_drill_timestamp_seconds") == NOW.timestamp()
    for job in ("nightly", "reconcile"):
        assert value("nexhb_job_last_success_timestamp_seconds", job=job) >= NOW.timestamp()


async def test_drift_that_a_command_found_is_shown(conn: Connection, value: Value) -> None:
    await conn.execute(
        """INSERT INTO job_runs (job, started_at, ended_at, status, host, counts)
           VALUES ('reconcile', $1, $1, 'completed', 'elsewhere', '{"checked": 200, "wrong": 5}')""",
        NOW,
    )
    await schedule.show(conn, NOW)
    assert value("nexhb_reconciliation_drift_ratio") == 0.025


async def test_days_ahead_end_at_the_first_gap(conn: Connection, value: Value) -> None:
    today = NOW.date()
    await partitions.ensure(conn, partitions.days_between(today, today + timedelta(days=5)))
    await schedule.show(conn, NOW)
    assert value("nexhb_days_ahead") == 5
    await conn.execute(f"DROP TABLE {partitions.name_of(today + timedelta(days=2))}")
    await schedule.show(conn, NOW)
    assert value("nexhb_days_ahead") == 1
    await conn.execute(f"DROP TABLE {partitions.name_of(today)}")
    await schedule.show(conn, NOW)
    assert value("nexhb_days_ahead") == -1


async def test_the_disk_of_somebody_elses_database_is_not_said_to_be_full(
    start_daemon: StartDaemon, value: Value
) -> None:
    await start_daemon()
    assert math.isnan(value("nexhb_disk_free_bytes"))
    assert math.isnan(value("nexhb_disk_free_inodes"))
    assert value("nexhb_connections_limit") == daemon.connections_most(20_000)
