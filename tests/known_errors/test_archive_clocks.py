"""Found by somebody whose task was to break the archive: clocks that are wrong by days."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nexhb import config, doctor, metrics, partitions
from nexhb.config import Settings
from nexhb.db import Connection, Database
from nexhb.jobs import nightly, runner, schedule
from nexhb.jobs.board import Jobs
from nexhb.jobs.schedule import due_since
from tests.conftest import StartDaemon
from tests.integration.test_jobs import job
from tests.integration.test_nightly import House

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


YEAR = timedelta(days=365)


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


async def heartbeats_of(conn: Connection, *moments: datetime) -> None:
    """Heartbeats were committed on the days of these moments."""
    await conn.executemany(
        "INSERT INTO ingest_ledger VALUES ($1, 1, 10, 0) ON CONFLICT DO NOTHING",
        [(moment.date(),) for moment in moments],
    )


async def run(house: House, now: datetime, **changes: object) -> runner.Run:
    """A nightly run."""
    return await runner.run(house.database, nightly.job(replace(house.means(), **changes)), now)  # type: ignore[arg-type]


async def test_a_clock_that_is_a_year_ahead_with_its_database_sends_no_day_away(house: House) -> None:
    """The host's clock was a year ahead, and the embedded PostgreSQL's with it: both agreed.

    Every day, today included, was archived and dropped, and the last good run silenced the alerts for a year.
    """
    await house.fill(NOW.date())
    assert (await run(house, NOW)).status == "completed"
    await heartbeats_of(house.conn, NOW)
    for days in (0, 1, 2):  # it goes on asking, also while heartbeats come and are stored by the wrong clock
        wrong = NOW + YEAR + timedelta(days=days)
        await heartbeats_of(house.conn, wrong)
        done = await run(house, wrong)
        assert (done.status, "365 days" in done.reason, "--yes" in done.reason) == ("failed", True, True)
        assert "22 days would be archived and dropped" in done.reason
    asked = await runner.run(house.database, nightly.dry_run(house.means()), wrong)
    assert "--yes" in asked.counts["asks"]
    assert len(await partitions.attached(house.conn)) == 22
    assert (await run(house, NOW + timedelta(days=1))).status == "completed"  # the clock was set
    done = await run(house, NOW + YEAR, yes=True)  # it was right after all
    assert (done.status, done.counts["dropped"]) == ("completed", 23)


async def test_a_first_run_by_a_clock_that_is_ahead_asks_too(house: House) -> None:
    days = partitions.days_between(NOW.date() - timedelta(days=7), NOW.date() + timedelta(days=14))
    await partitions.ensure(house.conn, days)
    done = await run(house, NOW + YEAR)
    assert (done.status, "22 of the 22 that are attached" in done.reason) == ("failed", True)
    assert len(await partitions.attached(house.conn)) == 22


async def test_a_retention_that_is_shortened_to_a_few_days_asks_and_a_day_less_does_not(house: House) -> None:
    await partitions.ensure(house.conn, partitions.days_between(NOW.date() - timedelta(days=90), NOW.date()))
    assert (await run(house, NOW)).status == "completed"
    tomorrow = NOW + timedelta(days=1)
    done = await run(house, tomorrow, rules=replace(house.rules, retention_days=30))
    assert (done.status, "61 of the 105" in done.reason) == ("failed", True)
    done = await run(house, tomorrow, rules=replace(house.rules, retention_days=80))
    assert (done.status, done.counts["dropped"]) == ("completed", 11)


@pytest.mark.parametrize("witness", ["runs that failed in part", "heartbeats"])
async def test_weeks_that_something_bears_witness_to_are_no_reason_to_ask(house: House, witness: str) -> None:
    """A store that was away for three weeks, or a timer that nobody had set: the clock is right."""
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


async def test_what_a_clock_ahead_wrote_down_counts_as_never(house: House, now: datetime, tmp_path: Path) -> None:
    """Once the clock was set, the last good run and drill lay in the future: neither doctor nor an alert missed one.

    A day that was counted and frozen then was not counted or frozen when its time came.
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
    await schedule.show(conn, now)
    for name in ("nightly", "reconcile"):
        assert metrics.job_last_success.labels(job=name)._value.get() == 0
    lines = {line.name: line for line in await doctor.examine(conn, Settings(data_dir=tmp_path), now)}
    assert not lines["restore drill"].good
    assert "last good run never" in lines["nightly"].said or "no run yet" in lines["nightly"].said
    await conn.execute("DELETE FROM hb_partitions WHERE partition_name = 'some_day'")
    done = await run(house, now)
    assert (done.counts["counted"], done.counts["frozen"]) == (1, 1)
    assert (await house.state(day))["row_count"] == 150
