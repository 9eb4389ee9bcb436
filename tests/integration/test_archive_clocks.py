"""Errors caused by clocks that are wrong by days, found by trying to break the archive."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nexhb import config, metrics, partitions
from nexhb.config import Settings
from nexhb.doctor import checks
from nexhb.jobs import nightly, runner, schedule
from nexhb.jobs.registry import Jobs
from nexhb.jobs.runner import Job, JobResult
from nexhb.jobs.schedule import due_since
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from tests.conftest import StartDaemon
from tests.support.nightly import House

pytestmark = pytest.mark.usefixtures("no_days")  # whether a clock is believed depends on the days that exist
NOW = datetime(2026, 6, 15, 12, 0, tzinfo=UTC)


async def nothing(_conn: Connection, _now: datetime) -> JobResult:
    return JobResult({})


NIGHTLY = Job("nightly", Lock.NIGHTLY, "nightly_maintenance", nothing)


@pytest.mark.parametrize("off", [timedelta(days=200), timedelta(days=-200)])
async def test_no_day_is_archived_if_the_clock_differs_from_the_databases(
    database: Database, conn: Connection, tmp_path: Path, off: timedelta
) -> None:
    """Formerly, if the clock of a daemon, or of a laptop on which somebody called `nexhb nightly`, was 200 days ahead,
    every day, including today and the future ones, was archived and dropped, and each heartbeat of the next two weeks
    was late.

    Such a run now does nothing and fails.
    """
    today = datetime.now(UTC).date()
    await partitions.ensure(conn, partitions.days_between(today - timedelta(days=7), today + timedelta(days=14)))
    jobs = Jobs(database, Settings(data_dir=tmp_path), lambda: datetime.now(UTC) + off)
    run = await jobs.nightly()
    assert (run.status, "set the clocks" in run.reason) == ("failed", True)
    assert len(await partitions.attached(conn)) == 22
    jobs = Jobs(database, Settings(data_dir=tmp_path), lambda: datetime.now(UTC) + timedelta(minutes=30))
    assert (await jobs.nightly()).status == "completed"


async def test_a_run_recorded_by_a_clock_that_was_ahead_does_not_stop_the_schedule(
    database: Database, conn: Connection
) -> None:
    """A daemon's clock was 200 days ahead for one run, and then corrected.

    Formerly, the recorded run was in the future, so nothing was due for 200 days: no nightly run, no reconciliation.
    """
    await runner.run(database, NIGHTLY, NOW + timedelta(days=200))
    await runner.run(database, NIGHTLY, NOW - timedelta(days=1))
    last = await runner.last_started(conn, "nightly", NOW)
    assert last == NOW - timedelta(days=1)
    due = due_since(config.JobsSettings().nightly, NOW, last)
    assert due is not None
    assert (await runner.run(database, NIGHTLY, NOW, unless_since=due)).status == "completed"
    assert (await runner.run(database, NIGHTLY, NOW, unless_since=due)).reason == "already_ran"


async def test_a_status_from_a_clock_that_was_ahead_is_replaced(start_daemon: StartDaemon, now: datetime) -> None:
    """Formerly, a heartbeat received by a daemon whose clock was 200 days ahead stayed its device's last status for 200
    days.

    Only a newer heartbeat replaces a status, and none was newer: the device counted as online however long it was
    silent. A time that no device's clock may have is not trusted now.
    """
    wrong = await start_daemon(now=now + timedelta(days=200))
    agent = await wrong.agent()
    assert (await agent.send(now)).status == 200
    right = await start_daemon()
    assert (await replace(agent, nexhb=right).send(now)).status == 200
    [row] = await right.rows("SELECT last_ts, clock_wrong FROM device_last_status")
    assert (row["last_ts"], row["clock_wrong"]) == (now, False)


YEAR = timedelta(days=365)


async def heartbeats_of(conn: Connection, *moments: datetime) -> None:
    """Add committed heartbeats on the days of these times to the ledger."""
    await conn.executemany(
        "INSERT INTO ingest_ledger VALUES ($1, 1, 10, 0) ON CONFLICT DO NOTHING",
        [(moment.date(),) for moment in moments],
    )


async def run(house: House, now: datetime, **changes: object) -> runner.JobRun:
    """Run the nightly job."""
    return await runner.run(house.database, nightly.nightly_job(replace(house.context(), **changes)), now)  # type: ignore[arg-type]


async def test_no_day_is_archived_if_the_clock_and_its_database_are_a_year_ahead(house: House) -> None:
    """Formerly, a host's clock that was a year ahead went unnoticed, because the embedded PostgreSQL uses the same
    clock: every day, today included, was archived and dropped, and the last successful run silenced the alerts for a
    year."""
    await house.fill(NOW.date())
    assert (await run(house, NOW)).status == "completed"
    await heartbeats_of(house.conn, NOW)
    # A run still needs a confirmation after heartbeats were received and stored with times of the wrong clock.
    for days in (0, 1, 2):
        wrong = NOW + YEAR + timedelta(days=days)
        await heartbeats_of(house.conn, wrong)
        done = await run(house, wrong)
        assert (done.status, "365 days" in done.reason, "--yes" in done.reason) == ("failed", True, True)
        assert "22 days would be archived and dropped" in done.reason
    dry_run = await runner.run(house.database, nightly.dry_run_job(house.context()), wrong)
    assert "--yes" in dry_run.counts["asks"]
    assert len(await partitions.attached(house.conn)) == 22
    assert (await run(house, NOW + timedelta(days=1))).status == "completed"  # the clock was corrected
    done = await run(house, NOW + YEAR, confirmed=True)  # the clock was right after all
    assert (done.status, done.counts["dropped"]) == ("completed", 23)


async def test_a_first_run_with_a_clock_that_is_ahead_needs_a_confirmation_too(house: House) -> None:
    days = partitions.days_between(NOW.date() - timedelta(days=7), NOW.date() + timedelta(days=14))
    await partitions.ensure(house.conn, days)
    done = await run(house, NOW + YEAR)
    assert (done.status, "22 of the 22 attached days" in done.reason) == ("failed", True)
    assert len(await partitions.attached(house.conn)) == 22


async def test_a_retention_shortened_to_a_few_days_needs_a_confirmation_and_one_day_less_does_not(house: House) -> None:
    await partitions.ensure(house.conn, partitions.days_between(NOW.date() - timedelta(days=90), NOW.date()))
    assert (await run(house, NOW)).status == "completed"
    tomorrow = NOW + timedelta(days=1)
    done = await run(house, tomorrow, rules=replace(house.rules, retention_days=30))
    assert (done.status, "61 of the 105" in done.reason) == ("failed", True)
    done = await run(house, tomorrow, rules=replace(house.rules, retention_days=80))
    assert (done.status, done.counts["dropped"]) == ("completed", 11)


@pytest.mark.parametrize("witness", ["runs that failed in part", "heartbeats"])
async def test_weeks_with_runs_or_heartbeats_need_no_confirmation(house: House, witness: str) -> None:
    """The clock may be right although no run archived anything for three weeks: the store was unavailable, or no timer
    was set."""
    await house.fill(NOW.date() - timedelta(days=89))
    assert (await run(house, NOW)).status == "completed"
    nights = [NOW + timedelta(days=n) for n in range(1, 30)]
    if witness == "heartbeats":
        await heartbeats_of(house.conn, *nights[::10])
    else:
        await house.conn.executemany(
            """INSERT INTO job_runs (job, started_at, ended_at, status, counts, host)
               VALUES ('nightly', $1, $1, 'failed', '{"failed_steps": 1}', 'x')""",
            [(night,) for night in nights],
        )
    assert (await run(house, nights[-1])).status == "completed"


async def test_times_written_by_a_clock_that_was_ahead_do_not_count(
    house: House, now: datetime, tmp_path: Path
) -> None:
    """Formerly, once the clock was corrected, the last successful run and the last drill were in the future: neither
    doctor nor an alert noticed that later runs and drills were missing.

    A day that the wrong clock had let the nightly run count and freeze was not counted or frozen when it was due.
    """
    conn, day = house.conn, now.date() - timedelta(days=8)
    await house.fill(day)
    await conn.execute(
        """INSERT INTO job_runs (job, started_at, ended_at, status, host)
           SELECT job, $1, $1, 'completed', 'x' FROM unnest('{nightly,reconcile}'::text[]) job""",
        now + YEAR,
    )
    await conn.execute(
        """INSERT INTO hb_partitions (partition_name, range_start, range_end, state, archive_url, drilled_at)
           VALUES ('some_day', '2025-01-01Z', '2025-01-02Z', 'dropped', 'file:///x/y/z', $1)""",
        now + YEAR,
    )
    await conn.execute("UPDATE hb_partitions SET counted_at = $1, frozen_at = $1, row_count = 7", now + YEAR)
    await schedule.update_metrics(conn, now)
    for name in ("nightly", "reconcile"):
        assert metrics.job_last_success.labels(job=name)._value.get() == 0
    lines = {line.name: line for line in await checks.run_checks(conn, Settings(data_dir=tmp_path), now)}
    assert not lines["restore drill"].passed
    detail = lines["nightly"].detail
    assert "last successful run: never" in detail or "no run yet" in detail
    await conn.execute("DELETE FROM hb_partitions WHERE partition_name = 'some_day'")
    done = await run(house, now)
    assert (done.counts["counted"], done.counts["frozen"]) == (1, 1)
    assert (await house.state(day))["row_count"] == 150
