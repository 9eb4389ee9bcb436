"""The daemon runs one run of a job at a time, records each run, and makes up for a missed run."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr

from nexhb import config, daemon, log, metrics, partitions
from nexhb.config import Settings
from nexhb.errors import BadInput
from nexhb.jobs import runner, schedule
from nexhb.jobs.registry import Jobs
from nexhb.jobs.runner import Job, JobResult, JobRun
from nexhb.jobs.schedule import Schedule, due_since
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon, example

NOW = datetime(2026, 6, 15, 12, 0, tzinfo=UTC)


async def nothing(_conn: Connection, _now: datetime) -> JobResult:
    return JobResult({"looked": 1})


def job(work: Any = nothing) -> Job:
    """Return a job that does this work."""
    return Job("nightly", Lock.NIGHTLY, "nightly_maintenance", work)


async def runs(conn: Connection) -> list[tuple[Any, ...]]:
    """Return status, reason, started_at and ended_at of every run."""
    return [
        tuple(row)
        for row in await conn.fetch("SELECT status, reason, started_at, ended_at FROM job_runs ORDER BY run_no")
    ]


async def post(nexhb: Nexhb, path: str, status: int = 200, key: str = ADMIN_KEY) -> Any:
    """Call the endpoint as an operator's timer does."""
    async with nexhb.http.post(f"{nexhb.url}{path}", headers={"x-admin": key}) as response:
        body = await response.json()
        assert response.status == status, body
        return body


# ---- the runner -------------------------------------------------------------------------------------------------


async def test_a_run_is_recorded_from_start_to_end(database: Database, conn: Connection) -> None:
    async def work(_conn: Connection, _now: datetime) -> JobResult:
        assert await runs(conn) == [("running", None, NOW, None)]
        return JobResult({"looked": 3})

    run = await runner.run(database, job(work), NOW)
    assert (run.status, run.counts) == ("completed", {"looked": 3})
    [(status, reason, started, ended)] = await runs(conn)
    assert (status, reason, started) == ("completed", None, NOW)
    assert NOW <= ended < NOW + timedelta(minutes=1)
    [row] = await runner.last_runs(conn, 1)
    assert row["counts"] == {"looked": 3}


async def test_a_run_that_raises_has_failed_with_the_reason(database: Database, conn: Connection) -> None:
    async def work(_conn: Connection, _now: datetime) -> JobResult:
        raise ValueError("something nobody foresaw")

    run = await runner.run(database, job(work), NOW)
    assert (run.status, run.reason) == ("failed", "ValueError: something nobody foresaw")
    assert [row[:2] for row in await runs(conn)] == [("failed", "ValueError: something nobody foresaw")]


@pytest.mark.parametrize(("error", "traced"), [(BadInput("a choice is needed"), False), (ValueError("a bug"), True)])
async def test_an_expected_failure_is_logged_without_a_traceback(
    database: Database, capfd: pytest.CaptureFixture[str], error: Exception, traced: bool
) -> None:
    """Formerly, a refused import showed a Python traceback above the message that says what to choose."""

    async def work(_conn: Connection, _now: datetime) -> JobResult:
        raise error

    log.setup("info")
    await runner.run(database, job(work), NOW)
    [line] = [line for line in capfd.readouterr().err.splitlines() if '"job.failed"' in line]
    assert ("Traceback" in line, f"{error}" in line) == (traced, True)


async def test_a_run_that_loses_its_connection_has_failed_and_is_recorded(database: Database, conn: Connection) -> None:
    async def work(own: Connection, _now: datetime) -> JobResult:
        await conn.execute("SELECT pg_terminate_backend($1, 60000)", await own.fetchval("SELECT pg_backend_pid()"))
        await own.fetch("SELECT 1")
        return JobResult({})

    assert (await runner.run(database, job(work), NOW)).status == "failed"
    assert [row[0] for row in await runs(conn)] == ["failed"]
    assert (await runner.run(database, job(), NOW)).status == "completed"  # the first lock ended with its connection


async def test_a_partial_failure_is_a_failure_and_its_counts_are_kept(database: Database, conn: Connection) -> None:
    async def work(_conn: Connection, _now: datetime) -> JobResult:
        return JobResult({"archived": 2}, ("archive x: no", "drop y: no"))

    run = await runner.run(database, job(work), NOW)
    assert (run.status, run.reason, run.counts) == ("failed", "archive x: no; drop y: no", {"archived": 2})
    assert [row[0] for row in await runs(conn)] == ["failed"]


async def test_a_run_whose_daemon_was_killed_is_closed_by_the_next(database: Database, conn: Connection) -> None:
    await conn.execute(
        "INSERT INTO job_runs (job, started_at, status, host) VALUES ('nightly', $1, 'running', 'a dead host')",
        NOW - timedelta(hours=1),
    )
    await runner.run(database, job(), NOW)
    assert [row[:2] for row in await runs(conn)] == [
        ("failed", "its daemon ended in the middle of it"),
        ("completed", None),
    ]


async def test_a_run_that_was_closed_by_the_next_stays_closed_whenever_it_ends(
    database: Database, conn: Connection
) -> None:
    """The daemon of the first run hung, and lost the lock together with its connection. It continued after the second
    run had recorded the first run as failed."""

    async def work(_own: Connection, _now: datetime) -> JobResult:
        await conn.execute(sql.queries("jobs")["fail_interrupted"], "nightly", NOW)
        return JobResult({"looked": 1})

    await runner.run(database, job(work), NOW)
    assert [row[:2] for row in await runs(conn)] == [("failed", "its daemon ended in the middle of it")]


async def test_a_run_closes_none_of_another_job(database: Database, conn: Connection) -> None:
    """When a nightly run closes interrupted nightly runs, a reconciliation in progress stays "running"."""
    await conn.execute(
        "INSERT INTO job_runs (job, started_at, status, host) VALUES ('reconcile', $1, 'running', 'x')", NOW
    )
    await runner.run(database, job(), NOW)
    assert [row[0] for row in await runs(conn)] == ["running", "completed"]


async def test_the_schedule_records_no_run_while_the_lock_is_held(database: Database, conn: Connection) -> None:
    """The schedule checks four times per minute, and a nightly run may take hours."""
    async with held(conn, Lock.NIGHTLY, wait=False):
        run = await runner.run(database, job(), NOW, unless_since=NOW - timedelta(hours=1))
    assert (run.status, run.reason) == ("skipped", "lock_held")
    assert await runs(conn) == []


async def test_a_dry_run_takes_no_lock_and_leaves_no_trace(database: Database, conn: Connection) -> None:
    dry = replace(job(), dry_run=True)
    async with held(conn, Lock.NIGHTLY, wait=False):
        assert (await runner.run(database, dry, NOW)).status == "completed"
    assert await runs(conn) == []


async def test_each_job_has_its_own_metrics_and_a_failure_is_no_success(database: Database) -> None:
    async def fails(_conn: Connection, _now: datetime) -> JobResult:
        return JobResult({}, ("no",))

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, labels)

    ended = "nexhb_job_last_success_timestamp_seconds"
    before = value("reconciliation_runs_total", status="failed") or 0
    metrics.job_last_success.labels(job="nightly").set(1)
    await runner.run(database, job(fails), NOW)
    assert (value("reconciliation_runs_total", status="failed") or 0) == before
    assert value(ended, job="nightly") == 1
    await runner.run(database, Job("reconcile", Lock.RECONCILE, "reconciliation", fails), NOW)
    assert value("reconciliation_runs_total", status="failed") == before + 1
    await runner.run(database, job(), NOW)
    assert (value(ended, job="nightly") or 0) >= NOW.timestamp()


async def test_a_held_lock_is_reported_and_nothing_changes(database: Database, conn: Connection) -> None:
    async with held(conn, Lock.NIGHTLY, wait=False):
        run = await runner.run(database, job(), NOW)
    assert (run.status, run.reason) == ("skipped", "lock_held")
    assert [row[:2] for row in await runs(conn)] == [("skipped", "lock_held")]


async def test_another_jobs_lock_is_another_lock(database: Database, conn: Connection) -> None:
    async with held(conn, Lock.RECONCILE, wait=False):
        assert (await runner.run(database, job(), NOW)).status == "completed"


async def test_a_job_that_another_daemon_ran_since_it_was_due_is_not_run_again(
    database: Database, conn: Connection
) -> None:
    await runner.run(database, job(), NOW)
    run = await runner.run(database, job(), NOW + timedelta(seconds=20), unless_since=NOW - timedelta(seconds=5))
    assert (run.status, run.reason) == ("skipped", "already_ran")
    assert len(await runs(conn)) == 1
    run = await runner.run(database, job(), NOW + timedelta(days=1), unless_since=NOW + timedelta(hours=20))
    assert run.status == "completed"


# ---- the schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "due"),
    [
        (None, datetime(2026, 6, 15, 3, tzinfo=UTC)),  # never run: due at once
        (datetime(2026, 6, 15, 3, 0, 12, tzinfo=UTC), None),
        (datetime(2026, 6, 15, 3, 0, 0, tzinfo=UTC), None),
        (datetime(2026, 6, 15, 2, 59, tzinfo=UTC), datetime(2026, 6, 15, 3, tzinfo=UTC)),
        (datetime(2026, 6, 1, 3, 0, 12, tzinfo=UTC), datetime(2026, 6, 15, 3, tzinfo=UTC)),
    ],
)
def test_a_job_is_due_if_it_should_have_started_and_has_not(last: datetime | None, due: datetime | None) -> None:
    assert due_since("0 3 * * *", NOW, last) == due


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


class Recorder(Jobs):
    """Jobs that only record their calls."""

    def __init__(self, database: Database, settings: Settings, clock: Clock) -> None:
        super().__init__(database, settings, clock)
        self._database, self._clock = database, clock
        self.called = asyncio.Queue[str]()

    async def _call(self, name: str, lock: Lock, **arguments: Any) -> JobRun:
        run = await runner.run(self._database, Job(name, lock, name, nothing), self._clock(), **arguments)
        if run.status == "completed":
            self.called.put_nowait(name)
        return run

    async def nightly(self, **arguments: Any) -> JobRun:
        """Record a call of the nightly run."""
        return await self._call("nightly", Lock.NIGHTLY, **arguments)

    async def reconcile(self, **arguments: Any) -> JobRun:
        """Record a call of the reconciliation."""
        return await self._call("reconcile", Lock.RECONCILE, **arguments)


@pytest.fixture
def fast_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the schedule check all the time."""
    monkeypatch.setattr(schedule, "CHECK_INTERVAL_S", 0.02)


@pytest.mark.usefixtures("fast_schedule")
async def test_a_missed_run_is_made_up_for_once_and_the_next_one_runs_when_due(
    database: Database, tmp_path: Path
) -> None:
    clock = Clock()
    settings = Settings(data_dir=tmp_path, jobs=config.JobsSettings(jitter_seconds=0, reconcile=""))
    # Of two daemons, one runs a due job.
    jobs = [Recorder(database, settings, clock) for _ in range(2)]
    tasks = [asyncio.create_task(Schedule(database, one, settings.jobs, clock).run()) for one in jobs]
    try:
        first = await asyncio.wait_for(_either(jobs), SOON_S)
        assert first == "nightly"
        await asyncio.sleep(0.3)  # ten checks, in which no daemon runs the job again
        assert [one.called.qsize() for one in jobs] == [0, 0]
        clock.now = NOW + timedelta(hours=15, seconds=1)
        assert await asyncio.wait_for(_either(jobs), SOON_S) == "nightly"
        await asyncio.sleep(0.3)
        assert [one.called.qsize() for one in jobs] == [0, 0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _either(jobs: list[Recorder]) -> str:
    waiting = [asyncio.ensure_future(one.called.get()) for one in jobs]
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for one in rest:
        one.cancel()
    return done.pop().result()


@pytest.mark.usefixtures("fast_schedule")
@pytest.mark.parametrize(("killed", "again"), [(1, True), (2, True), (3, False)])
async def test_a_run_whose_daemon_was_killed_is_repeated_unless_the_job_kills_it_every_time(
    database: Database, conn: Connection, tmp_path: Path, killed: int, again: bool
) -> None:
    for minutes in range(killed):
        await conn.execute(
            "INSERT INTO job_runs (job, started_at, status, reason, host) VALUES ('nightly', $1, $2, $3, 'dead')",
            datetime(2026, 6, 15, 3, minutes, tzinfo=UTC),
            *(("running", None) if minutes == killed - 1 else ("failed", "its daemon ended in the middle of it")),
        )
    settings = Settings(data_dir=tmp_path, jobs=config.JobsSettings(jitter_seconds=0, reconcile=""))
    jobs = Recorder(database, settings, Clock())
    task = asyncio.create_task(Schedule(database, jobs, settings.jobs, Clock()).run())
    try:
        async with asyncio.timeout(SOON_S if again else 0.5):
            assert await jobs.called.get() == "nightly"
        assert again
    except TimeoutError:
        assert not again
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("fast_schedule")
async def test_a_schedule_survives_an_unavailable_database(tmp_path: Path, database: Database) -> None:
    clock, settings = Clock(), Settings(data_dir=tmp_path, jobs=config.JobsSettings(jitter_seconds=0))
    away = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    jobs = Recorder(database, settings, clock)
    lost = Schedule(away, jobs, settings.jobs, clock)
    task = asyncio.create_task(lost.run())
    await asyncio.sleep(0.3)
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_the_daemon_runs_what_was_missed(
    start_daemon: StartDaemon, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "CHECK_INTERVAL_S", 0.02)
    await start_daemon(jobs=config.JobsSettings(jitter_seconds=0))
    async with asyncio.timeout(SOON_S):
        while {row["job"] for row in await conn.fetch("SELECT job FROM job_runs WHERE status = 'completed'")} != {
            "nightly",
            "reconcile",
        }:
            await asyncio.sleep(0.05)


async def test_a_daemon_that_stops_does_not_wait_for_its_job_and_the_next_run_records_it(
    database: Database, conn: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "CHECK_INTERVAL_S", 0.02)
    settings = Settings(
        data_dir=tmp_path,
        server=config.ServerSettings(port=0, shutdown_timeout_seconds=1),
        database=config.DatabaseSettings(url=SecretStr(database.dsn)),
        jobs=config.JobsSettings(jitter_seconds=0, reconcile=""),
    )
    other = await database.connect(application="a heavy lock")
    async with other.transaction():
        # The job's VACUUM will wait for this lock.
        await other.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        async with daemon.running(settings):
            async with asyncio.timeout(SOON_S):
                while not await conn.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'VACUUM%status%'"
                ):
                    await asyncio.sleep(0.02)
    await other.close()
    async with asyncio.timeout(SOON_S):
        while await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"):
            await asyncio.sleep(0.02)
    assert [row[0] for row in await runs(conn)] == ["running"]
    await runner.run(database, job(), NOW)
    assert [row[0] for row in await runs(conn)] == ["failed", "completed"]


# ---- over HTTP --------------------------------------------------------------------------------------------------


async def test_operators_run_the_jobs_and_see_their_results(nexhb: Nexhb) -> None:
    plan = await post(nexhb, "/ops/nightly?dry_run=true")
    assert plan["status"] == "completed"
    assert plan["plan"][0].keys() == {"step", "target", "reason"}
    assert (await nexhb.get("/ops/jobs"))["jobs"] == {"nightly": [], "reconcile": []}
    done = await post(nexhb, "/ops/nightly")
    assert (done["status"], done.get("drilled", 0)) == ("completed", 0)
    assert done["elapsed_ms"] >= 0
    assert (await post(nexhb, "/ops/reconcile?dry_run=1"))["checked"] == 0
    assert (await post(nexhb, "/ops/reconcile"))["status"] == "completed"
    jobs = (await nexhb.get("/ops/jobs"))["jobs"]
    assert {name: [run["status"] for run in runs] for name, runs in jobs.items()} == {
        "nightly": ["completed"],
        "reconcile": ["completed"],
    }
    assert jobs["nightly"][0]["counts"]["vacuumed"] > 0
    for name in ("nightly", "reconcile"):
        assert await nexhb.metric(f'nexhb_job_last_success_timestamp_seconds{{job="{name}"}}') > 0
    assert await nexhb.metric('reconciliation_runs_total{status="completed"}') >= 1


async def test_the_response_for_a_held_lock_is_200_skipped(nexhb: Nexhb, conn: Connection) -> None:
    async with held(conn, Lock.NIGHTLY, wait=False), held(conn, Lock.RECONCILE, wait=False):
        for path in ("/ops/nightly", "/ops/reconcile"):
            body = await post(nexhb, path)
            assert (body["status"], body["reason"]) == ("skipped", "lock_held")


async def test_from_several_daemons_at_once_exactly_one_runs(start_daemon: StartDaemon) -> None:
    daemons = [await start_daemon() for _ in range(3)]
    answers = await asyncio.gather(*(post(one, "/ops/nightly") for one in daemons for _ in range(2)))
    assert sorted(one["status"] for one in answers) == ["completed", *["skipped"] * 5]


async def test_the_response_for_a_failed_run_is_500_with_its_reason(
    start_daemon: StartDaemon, conn: Connection
) -> None:
    nexhb = await start_daemon(archive=config.ArchiveSettings(url="file:///proc/no/such/place"))
    old = nexhb.clock().date() - timedelta(days=95)
    await partitions.ensure(conn, [old])
    body = await post(nexhb, "/ops/nightly", 500)
    assert (body["status"], body["failed_steps"]) == ("failed", 1)
    assert "/proc/no/such/place" in body["reason"]
    assert (await nexhb.get("/ops/jobs"))["jobs"]["nightly"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/ops/nightly?dry_run=perhaps", "dry_run"),
        ("/ops/reconcile?max_rows=0", "max_rows"),
        ("/ops/reconcile?max_rows=many", "max_rows"),
    ],
)
async def test_a_bad_parameter_is_named(nexhb: Nexhb, path: str, name: str) -> None:
    assert [error["path"] for error in (await post(nexhb, path, 400))["errors"]] == [name]


@pytest.mark.parametrize("path", ["/ops/nightly", "/ops/reconcile"])
async def test_jobs_need_the_admin_key(nexhb: Nexhb, conn: Connection, path: str) -> None:
    await post(nexhb, path, 401, key="not the key")
    assert await runs(conn) == []


async def test_a_client_that_disconnects_does_not_stop_the_job(nexhb: Nexhb, conn: Connection) -> None:
    async with conn.transaction():
        # The job waits for this row lock; its caller does not wait for the job.
        await conn.execute("LOCK TABLE job_runs IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.3):
                await post(nexhb, "/ops/reconcile")
    async with asyncio.timeout(SOON_S):
        while [row[0] for row in await runs(conn)] != ["completed"]:
            await asyncio.sleep(0.05)


async def test_reconcile_continues_where_the_last_run_stopped(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(5)]
    for agent in agents:
        assert (await agent.send(now)).status == 200
    await conn.execute("DELETE FROM device_last_status")
    for left in (3, 1, 0):
        assert (await post(nexhb, "/ops/reconcile?max_rows=2"))["status"] == "completed"
        assert await conn.fetchval("SELECT 5 - count(*) FROM device_last_status") == left
    assert example(now)["battery"]["pct"] == await conn.fetchval("SELECT max(battery_pct) FROM device_last_status")
    drift = await nexhb.metric("nexhb_reconciliation_drift_ratio")
    assert 0 <= drift <= 1
