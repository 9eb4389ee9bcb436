"""Metrics that describe the database are read from it, because other daemons and commands use it too."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from nexhb import open_files, partitions
from nexhb.jobs import registry, runner, schedule
from nexhb.postgres.connections import Connection, Database
from tests.conftest import StartDaemon
from tests.support.nightly import NOW, OLD, House

Value = Callable[..., float]


@pytest.fixture
def value() -> Value:
    """Return a function that returns the current value of a metric."""

    def read(name: str, **labels: str) -> float:
        sample = REGISTRY.get_sample_value(name, labels)
        assert sample is not None, (name, labels)
        return sample

    return read


async def test_the_time_of_the_last_success_is_0_for_a_job_that_never_succeeded(conn: Connection, value: Value) -> None:
    await schedule.update_metrics(conn, NOW)
    for job in ("nightly", "reconcile"):
        assert value("nexhb_job_last_success_timestamp_seconds", job=job) == 0


async def test_metrics_include_the_work_of_other_daemons(
    database: Database, conn: Connection, tmp_path: Path, value: Value
) -> None:
    house = House(database, conn, tmp_path)
    await house.fill(OLD)
    await house.fill(OLD - timedelta(days=1))
    house.store.refuse = "0000"
    assert (await house.nightly()).status == "failed"
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_partitions", state="archive_failed") == 2
    assert value("nexhb_partitions", state="dropped") == 0
    assert value("nexhb_job_last_success_timestamp_seconds", job="nightly") == 0

    house.store.refuse = ""
    assert (await house.nightly()).status == "completed"
    await house.fill(NOW.date(), devices=4, rows=5)
    await runner.run(database, registry.reconcile_job(), NOW)
    await runner.run(database, registry.reconcile_job(), NOW)  # only the last run counts, and it finds no wrong row
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_partitions", state="archive_failed") == 0
    assert value("nexhb_partitions", state="dropped") == 2
    assert value("nexhb_reconciliation_drift_ratio") == 0
    assert value("nexhb_last_restore_drill_timestamp_seconds") == NOW.timestamp()
    for job in ("nightly", "reconcile"):
        assert value("nexhb_job_last_success_timestamp_seconds", job=job) >= NOW.timestamp()


async def test_metrics_include_the_drift_that_a_command_detected(conn: Connection, value: Value) -> None:
    await conn.execute(
        """INSERT INTO job_runs (job, started_at, ended_at, status, host, counts)
           VALUES ('reconcile', $1, $1, 'completed', 'elsewhere', '{"checked": 200, "wrong": 5}')""",
        NOW,
    )
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_reconciliation_drift_ratio") == 0.025


async def test_days_ahead_end_at_the_first_gap(conn: Connection, value: Value) -> None:
    today = NOW.date()
    await partitions.ensure(conn, partitions.days_between(today, today + timedelta(days=5)))
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_days_ahead") == 5
    await conn.execute(f"DROP TABLE {partitions.table_name(today + timedelta(days=2))}")
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_days_ahead") == 1
    await conn.execute(f"DROP TABLE {partitions.table_name(today)}")
    await schedule.update_metrics(conn, NOW)
    assert value("nexhb_days_ahead") == -1


async def test_the_disk_of_an_external_database_is_not_reported_as_full(
    start_daemon: StartDaemon, value: Value
) -> None:
    await start_daemon()
    assert math.isnan(value("nexhb_disk_free_bytes"))
    assert math.isnan(value("nexhb_disk_free_inodes"))
    assert value("nexhb_connections_limit") == open_files.connection_limit(20_000)
