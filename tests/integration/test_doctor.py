"""nexhb doctor reports each problem with its remedy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from bench.nexmdm import MONOLITHIC
from nexhb import config, disk, partitions
from nexhb.config import ReadsSettings, Settings
from nexhb.doctor import checks
from nexhb.doctor import database as database_checks
from nexhb.doctor.check import CheckResult
from nexhb.jobs import registry, runner
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from nexhb.reading import flags
from nexhb.reading.flags import Flags
from tests.support.nightly import NOW, OLD, House

ELSEWHERE = config.DatabaseSettings(url=SecretStr("postgresql://x"))
CHECKED_AT = NOW + timedelta(minutes=30)


async def results(
    house: House,
    now: datetime = CHECKED_AT,
    of: config.DatabaseSettings = ELSEWHERE,
    reads: ReadsSettings | None = None,
) -> dict[str, CheckResult]:
    """Return the results of the checks by name."""
    settings = Settings(data_dir=house.folder, database=of, reads=reads or ReadsSettings())
    return {result.name: result for result in await checks.run_checks(house.conn, settings, now)}


@pytest.fixture
async def healthy(database: Database, conn: Connection, tmp_path: Path) -> House:
    """Return a database in which every check passes: its jobs have run."""
    house = House(database, conn, tmp_path)
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await runner.run(house.database, registry.reconcile_job(), NOW)
    return house


async def test_a_healthy_database_passes_every_check(healthy: House) -> None:
    found = await results(healthy)
    assert [result for result in found.values() if not result.passed] == []
    assert checks.as_json(list(found.values()))["good"] is True
    assert set(found) == {
        "database", "clock", "schema", "database copy", "numbers", "days ahead", "detaches", "archive", "archive store",
        "late heartbeats", "nightly", "reconcile", "restore drill", "drift", "locks", "HOT updates", "disk", "flags",
        "shared tokens", "NexMDM", "opening hours", "messages", "offline after",
    }  # fmt: skip


async def test_an_interval_as_long_as_the_allowed_silence_fails_its_check(healthy: House) -> None:
    rules = config.HeartbeatSettings(interval_seconds=600)
    settings = Settings(data_dir=healthy.folder, database=ELSEWHERE, heartbeat=rules)
    found = {result.name: result for result in await checks.run_checks(healthy.conn, settings, CHECKED_AT)}[
        "offline after"
    ]
    assert (found.passed, found.remedy) == (False, "set heartbeat.offline_after_seconds to 1800, three intervals")


async def a_missing_day(house: House) -> None:
    name = partitions.table_name(NOW.date() + timedelta(days=2))
    await house.conn.execute(f"DROP TABLE {name}")


async def a_failed_archive(house: House) -> None:
    await house.fill(OLD - timedelta(days=1))
    house.store.refuse = "day-0000"
    assert (await house.nightly()).status == "failed"


async def an_old_day(house: House) -> None:
    await house.fill(OLD - timedelta(days=1))


async def a_late_heartbeat(house: House) -> None:
    await house.conn.execute(
        """INSERT INTO late_heartbeats (ts, received_at, device_no, bucket, label_no, clock_wrong, reason)
           VALUES ($1, $1, 1, 1, 1, false, 'dropped')""",
        NOW - timedelta(days=3),
    )


async def drift(house: House) -> None:
    await house.fill(NOW.date(), rows=5)
    await runner.run(house.database, registry.reconcile_job(), NOW)


async def an_old_migration(house: House) -> None:
    await house.conn.execute("DELETE FROM schema_migrations WHERE version > 3")


async def no_drill(house: House) -> None:
    await house.conn.execute("UPDATE hb_partitions SET drilled_at = $1", NOW - timedelta(days=9))


async def cold_updates(house: House) -> None:
    await house.conn.execute("SELECT pg_stat_force_next_flush()")
    await house.conn.execute("INSERT INTO devices (device_id) SELECT n::text FROM generate_series(1, 3000) n")
    await house.conn.execute("INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at) "
                             "SELECT n, n::text, now(), now(), now() FROM generate_series(1, 3000) n")  # fmt: skip
    for hours in range(5):
        await house.conn.execute(
            "UPDATE device_last_status SET heard_at = heard_at - make_interval(hours => $1)", hours + 1
        )
    await house.conn.execute("SELECT pg_stat_force_next_flush()")


async def fast_reads_that_perf_diff_turned_off(house: House) -> None:
    await flags.change(house.conn, {"read_from_last_status": False}, "perf_diff", NOW, Flags())


async def a_mismatch(house: House) -> None:
    await house.conn.execute(
        """INSERT INTO perf_diff_comparisons (query, compared_at, fast_ms, legacy_ms, fast_rows, legacy_rows,
        rows_differ, examples, host) VALUES ('offline', $1, 1, 1, 1, 1, 1, '{kiosk}', 'here')""",
        NOW,
    )


PROBLEMS: dict[str, tuple[Callable[[House], Awaitable[None]], str, str]] = {
    "a missing day": (a_missing_day, "days ahead", "nexhb nightly"),
    "a failed archive": (a_failed_archive, "archive", "The disk is full."),
    "an old day": (an_old_day, "archive", "nexhb nightly"),
    "a late heartbeat": (a_late_heartbeat, "late heartbeats", "nexhb nightly"),
    "drift": (drift, "drift", "nexhb reconcile"),
    "an old migration": (an_old_migration, "schema", "nexhb migrate"),
    "no drill": (no_drill, "restore drill", "archive verify"),
    "fast reads turned off": (fast_reads_that_perf_diff_turned_off, "flags", "perf_diff turned the fast reads off"),
    "a mismatch": (a_mismatch, "flags", "perf-diff report"),
    "cold updates": (cold_updates, "HOT updates", "VACUUM"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
async def test_a_problem_is_reported_with_its_remedy(healthy: House, problem: str) -> None:
    cause, name, words = PROBLEMS[problem]
    await cause(healthy)
    found = await results(healthy)
    assert not found[name].passed
    assert words in f"{found[name].detail} {found[name].remedy}"
    others = {result.name for result in found.values() if not result.passed} - {name}
    assert others <= ({"nightly"} if problem == "a failed archive" else set())


async def test_jobs_that_did_not_run_are_overdue_an_hour_after_they_were_due(healthy: House) -> None:
    found = await results(healthy, NOW + timedelta(hours=24, minutes=30))
    assert found["nightly"].passed
    found = await results(healthy, NOW + timedelta(hours=25, minutes=30))
    assert not found["nightly"].passed
    assert not found["reconcile"].passed
    assert "last successful run: 2026-06-15 03:00Z" in found["nightly"].detail


async def test_a_new_database_passes_although_its_first_runs_are_due(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    house = House(database, conn, tmp_path)
    await conn.execute("UPDATE schema_migrations SET applied_at = $1", NOW)
    for after_s, passes in ((20, True), (149, True), (151, False)):  # the limit: two minutes, and jobs.jitter_seconds
        found = await results(house, NOW + timedelta(seconds=after_s))
        assert [found[job].passed for job in ("nightly", "reconcile")] == [passes, passes]
    assert "the first run starts within minutes" in (await results(house, NOW))["nightly"].detail
    await conn.execute("INSERT INTO job_runs (job, status, reason, started_at, host) "
                       "VALUES ('nightly', 'failed', 'no room', $1, 'here')", NOW)  # fmt: skip
    found = await results(house, NOW + timedelta(seconds=20))
    assert [found[job].passed for job in ("nightly", "reconcile")] == [False, True]


async def test_the_version_is_the_servers_own(healthy: House) -> None:
    number = int(await healthy.conn.fetchval("SHOW server_version_num"))  # 180004
    assert (await results(healthy))["database"].detail.startswith(f"PostgreSQL {number // 10_000}.{number % 10_000} ")


async def test_a_pending_detach_and_the_holder_of_a_lock_are_named(
    healthy: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(partitions, "ATTEMPTS", 1)
    await healthy.fill(OLD - timedelta(days=1))
    reader = await healthy.database.connect(application="a long report")
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM device_heartbeats")
    await healthy.nightly()
    async with held(reader, Lock.NIGHTLY, wait=False):
        found = await results(healthy)
    assert not found["detaches"].passed
    assert partitions.table_name(OLD - timedelta(days=1)) in found["detaches"].detail
    assert "nightly by pid" in found["locks"].detail
    await reader.close()


async def test_a_check_that_raises_has_failed_and_the_others_still_run(healthy: House) -> None:
    await healthy.conn.execute("ALTER TABLE late_heartbeats RENAME TO gone")
    found = await results(healthy)
    assert not found["late heartbeats"].passed
    assert "gone" in found["late heartbeats"].detail or "does not exist" in found["late heartbeats"].detail
    assert found["nightly"].passed


async def test_the_free_space_for_the_embedded_database_is_given_in_days(
    healthy: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await healthy.fill(NOW.date() - timedelta(days=1))
    found = await results(healthy, of=config.DatabaseSettings())
    assert "GiB are free, " in found["disk"].detail
    assert found["disk"].passed
    found = await results(healthy, of=config.DatabaseSettings(disk_reserve_bytes=2**60))
    assert not found["disk"].passed
    space = disk.FreeSpace(2**40, 12, 2**20)
    monkeypatch.setattr(disk, "free_space", lambda _: space)
    found = await results(healthy, of=config.DatabaseSettings())
    assert (found["disk"].passed, "12 inodes are free" in found["disk"].detail) == (False, True)


async def test_a_configured_flag_that_is_not_in_force_is_named(healthy: House) -> None:
    assert (await results(healthy))["flags"].detail == "fast reads for 100 %, perf_diff off"
    await flags.change(healthy.conn, {"rollout_percent": 10, "perf_diff": True}, "Ada", NOW, Flags())
    found = (await results(healthy))["flags"]  # a flag was switched, and none is configured: nothing to report
    assert (found.passed, found.detail) == (True, "fast reads for 10 %, perf_diff on")
    assert (await results(healthy, reads=ReadsSettings(rollout_percent=10)))["flags"].passed
    found = (await results(healthy, reads=ReadsSettings(rollout_percent=50)))["flags"]
    assert not found.passed
    assert "reads.rollout_percent = 50 is not in force" in found.detail
    assert found.remedy == "remove reads.rollout_percent, or nexhb flags set rollout_percent=50"


async def test_fast_reads_that_were_switched_on_again_pass(healthy: House) -> None:
    await fast_reads_that_perf_diff_turned_off(healthy)
    await a_mismatch(healthy)
    assert not (await results(healthy))["flags"].passed
    await flags.change(healthy.conn, {"read_from_last_status": True}, "Ada", NOW, Flags())
    assert (await results(healthy))["flags"].passed


async def test_a_foreign_session_that_blocks_heartbeats_or_jobs_is_named(
    healthy: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_checks, "MAX_FOREIGN_LOCK_S", 0)
    foreign = await healthy.database.connect(application="psql")
    pid = foreign.get_server_pid()
    for blocking in (
        "LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE device_heartbeats IN SHARE MODE",
        "UPDATE device_last_status SET battery_pct = 1",
    ):
        async with foreign.transaction():
            await foreign.execute(blocking)
            found = (await results(healthy))["locks"]
        assert not found.passed
        assert f"heartbeats or jobs wait for pid {pid} (psql, idle in transaction)" in found.detail
        assert found.remedy == f"SELECT pg_terminate_backend({pid})"
    assert (await results(healthy))["locks"].passed
    async with foreign.transaction():  # a reader blocks no writer
        await foreign.execute("SELECT count(*) FROM device_last_status")
        assert (await results(healthy))["locks"].passed
    await foreign.close()


async def test_a_jobs_lock_is_stuck_if_a_foreign_session_holds_it_and_not_if_the_job_does(
    healthy: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_checks, "MAX_FOREIGN_LOCK_S", -1)
    for application, passes in (("psql", False), ("nexhb nightly", True)):
        holder = await healthy.database.connect(application=application)
        async with held(holder, Lock.NIGHTLY, wait=False):
            found = (await results(healthy))["locks"]
        assert found.passed is passes
        assert f"nightly by pid {holder.get_server_pid()} ({application}, idle)" in found.detail
        await holder.close()


async def test_a_detached_day_is_named(healthy: House) -> None:
    today = partitions.table_name(NOW.date())
    await healthy.conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {today}")
    found = (await results(healthy))["days ahead"]
    assert not found.passed
    assert f"{NOW.date()} is detached" in found.detail


async def test_whether_devices_that_enrol_at_nexmdm_are_known_here_is_reported(
    healthy: House, empty_database: Database
) -> None:
    async def result(source: str | None) -> CheckResult:
        legacy = config.LegacySettings(source=SecretStr(source) if source else None)
        settings = Settings(data_dir=healthy.folder, database=ELSEWHERE, legacy=legacy)
        return {r.name: r for r in await checks.run_checks(healthy.conn, settings, CHECKED_AT)}["NexMDM"]

    assert await result(None) == CheckResult("NexMDM", True, "nothing was imported, and legacy.source is not set")
    await healthy.conn.execute(
        "INSERT INTO job_runs (job, started_at, ended_at, status, host) VALUES ('import', $1, $1, 'completed', 'x')",
        NOW,
    )
    unset = await result(None)
    assert unset.passed
    assert f"the last import was {NOW:%Y-%m-%d %H:%MZ}" in unset.detail
    assert "third heartbeat, which is 20 minutes" in unset.detail
    away = await result("postgresql://nobody:geheim@127.0.0.1:1/nexmdm")
    assert (away.passed, "unknown tokens receive 503" in away.detail, "geheim" in away.detail) == (
        False,
        True,
        False,
    )
    assert (await result(empty_database.dsn)).detail.endswith(
        "not a NexMDM database: devices has no alias, id, token_hash."
    )
    source = await empty_database.connect(application="test source")
    await MONOLITHIC.create(source, NOW, NOW)
    await source.close()
    there = await result(empty_database.dsn)
    assert (there.passed, there.detail.startswith("tokens that nexhb does not know are looked up in ")) == (True, True)


async def test_messages_that_are_not_delivered_are_reported_by_route(healthy: House) -> None:
    assert "no messages about incidents" in (await results(healthy))["messages"].detail
    await healthy.conn.execute(
        "WITH i AS (INSERT INTO incidents (kind, scope, severity, since, opened_at) "
        "           VALUES ('offline', 'fleet', 'critical', $1, $1) RETURNING incident_id) "
        "INSERT INTO notifications "
        "(id, incident_id, route, kind, payload, created_at, due_at, last_error, given_up_at) "
        "SELECT name, incident_id, 'on-call', 'opened', '{}', $1, $1, 'The response is 500.', given_up_at "
        "FROM i, (VALUES ('a', NULL), ('b', $1), ('c', $1 - interval '25 hours')) AS n (name, given_up_at)",
        CHECKED_AT - timedelta(minutes=6),
    )
    found = (await results(healthy))["messages"]
    assert not found.passed
    assert "on-call: 1 wait since" in found.detail
    assert "1 given up: The response is 500." in found.detail
    assert "nexhb notify test" in found.remedy


async def test_hours_that_cannot_be_read_are_reported(healthy: House) -> None:
    await healthy.conn.execute("INSERT INTO sites (site, hours) VALUES ('store-42', 'Mo-Fr 08:00-20:00')")
    assert (await results(healthy))["opening hours"].passed
    await healthy.conn.execute("INSERT INTO sites (site, hours) VALUES ('store-43', 'whenever')")
    await healthy.conn.execute(
        'INSERT INTO silences (scope, "from", until, hours, zone, reason, created_by, created_at) '
        "VALUES ('fleet', $1, $2, 'Mo-', 'UTC', 'nights', 'ada', $1), ('fleet', $1, NULL, 'Mo', 'UTC', 'n', 'a', $1), "
        "('fleet', $1, NULL, 'Mo 99:00', 'UTC', 'nights', 'ada', $1)",
        CHECKED_AT - timedelta(days=2), CHECKED_AT - timedelta(days=1),
    )  # fmt: skip
    found = (await results(healthy))["opening hours"]
    assert not found.passed
    assert "the hours of silence 3, site store-43 cannot be read" in found.detail
