"""Found by somebody whose task was to break the archive: clocks that are wrong by days."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nexhb import config, partitions
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.jobs import runner
from nexhb.jobs.board import Jobs
from nexhb.jobs.schedule import due_since
from tests.conftest import StartDaemon
from tests.integration.test_jobs import job

NOW = datetime(2026, 6, 15, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize("off", [timedelta(days=200), timedelta(days=-200)])
async def test_a_clock_that_is_not_the_databases_sends_no_day_away(
    database: Database, conn: Connection, tmp_path: Path, off: timedelta
) -> None:
    """A daemon, or a laptop on which somebody called `nexhb nightly`, was 200 days ahead.

    Every day, today and those ahead too, was archived and dropped, and each heartbeat of the next two weeks was a late
    one. Such a run does nothing and fails.
    """
    today = datetime.now(UTC).date()
    await partitions.ensure(conn, partitions.days_between(today - timedelta(days=7), today + timedelta(days=14)))
    jobs = Jobs(database, Settings(data_dir=tmp_path), lambda: datetime.now(UTC) + off)
    run = await jobs.nightly()
    assert (run.status, "set the clocks" in run.reason) == ("failed", True)
    assert len(await partitions.attached(conn)) == 22
    jobs = Jobs(database, Settings(data_dir=tmp_path), lambda: datetime.now(UTC) + timedelta(minutes=30))
    assert (await jobs.nightly()).status == "completed"


async def test_a_run_of_a_clock_that_was_ahead_does_not_stop_the_schedule(database: Database, conn: Connection) -> None:
    """A daemon's clock was 200 days ahead for one run, and then set.

    The last run lay in the future, so nothing was due for 200 days: no nightly run, no reconciliation.
    """
    await runner.run(database, job(), NOW + timedelta(days=200))
    await runner.run(database, job(), NOW - timedelta(days=1))
    last = await runner.last_started(conn, "nightly", NOW)
    assert last == NOW - timedelta(days=1)
    due = due_since(config.Jobs().nightly, NOW, last)
    assert due is not None
    assert (await runner.run(database, job(), NOW, unless_since=due)).status == "completed"
    assert (await runner.run(database, job(), NOW, unless_since=due)).reason == "already_ran"


async def test_a_status_of_a_clock_that_was_ahead_gives_way(start_daemon: StartDaemon, now: datetime) -> None:
    """A heartbeat that a daemon 200 days ahead had taken was its device's last status for 200 days.

    Only newer wins, and nothing was: the device was online however long it was silent. What no clock of a device may
    say is not believed.
    """
    wrong = await start_daemon(now=now + timedelta(days=200))
    agent = await wrong.agent()
    assert (await agent.send(now)).status == 200
    right = await start_daemon()
    assert (await replace(agent, nexhb=right).send(now)).status == 200
    [row] = await right.rows("SELECT last_ts, clock_wrong FROM device_last_status")
    assert (row["last_ts"], row["clock_wrong"]) == (now, False)
