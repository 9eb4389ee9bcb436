"""nexhb doctor: each thing that can be wrong is said, with what mends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from bench.nexmdm import MONOLITHIC
from nexhb import config, disk, doctor, flags, partitions
from nexhb.config import Reads, Settings
from nexhb.db import Connection, Database
from nexhb.doctor import Line
from nexhb.flags import Flags
from nexhb.jobs import board, runner
from nexhb.locks import Lock, held
from tests.integration.test_nightly import NOW, OLD, House

ELSEWHERE = config.Database(url=SecretStr("postgresql://x"))
VISIT = NOW + timedelta(minutes=30)


async def lines(
    house: House, now: datetime = VISIT, of: config.Database = ELSEWHERE, reads: Reads | None = None
) -> dict[str, Line]:
    """The doctor's lines by name."""
    settings = Settings(data_dir=house.folder, database=of, reads=reads or Reads())
    return {line.name: line for line in await doctor.examine(house.conn, settings, now)}


@pytest.fixture
async def well(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house in which all is well: its jobs have run."""
    house = House(database, conn, tmp_path)
    await house.fill(OLD)
    assert (await house.nightly()).status == "completed"
    await runner.run(house.database, board.reconcile_job(), NOW)
    return house


async def test_a_healthy_house_has_only_good_lines(well: House) -> None:
    found = await lines(well)
    assert [line for line in found.values() if not line.good] == []
    assert doctor.shown(list(found.values()))["good"] is True
    assert set(found) == {
        "database", "clock", "schema", "database copy", "numbers", "days ahead", "detaches", "archive", "archive store",
        "late heartbeats", "nightly", "reconcile", "restore drill", "drift", "locks", "HOT updates", "disk", "flags",
        "shared tokens", "NexMDM", "offline after",
    }  # fmt: skip


async def test_an_interval_as_long_as_the_silence_that_is_allowed_is_a_bad_line(well: House) -> None:
    rules = config.HeartbeatRules(interval_seconds=600)
    settings = Settings(data_dir=well.folder, database=ELSEWHERE, heartbeat=rules)
    found = {line.name: line for line in await doctor.examine(well.conn, settings, VISIT)}["offline after"]
    assert (found.good, found.remedy) == (False, "set heartbeat.offline_after_seconds to 1800, three intervals")


async def a_missing_day(house: House) -> None:
    name = partitions.name_of(NOW.date() + timedelta(days=2))
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
    await runner.run(house.database, board.reconcile_job(), NOW)


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


WRONG: dict[str, tuple[Callable[[House], Awaitable[None]], str, str]] = {
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


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_is_said_with_what_mends_it(well: House, wrong: str) -> None:
    plant, name, told = WRONG[wrong]
    await plant(well)
    found = await lines(well)
    assert not found[name].good
    assert told in f"{found[name].said} {found[name].remedy}"
    others = {line.name for line in found.values() if not line.good} - {name}
    assert others <= ({"nightly"} if wrong == "a failed archive" else set())


async def test_jobs_that_did_not_run_are_overdue_an_hour_after_they_were_due(well: House) -> None:
    found = await lines(well, NOW + timedelta(hours=24, minutes=30))
    assert found["nightly"].good
    found = await lines(well, NOW + timedelta(hours=25, minutes=30))
    assert not found["nightly"].good
    assert not found["reconcile"].good
    assert "last good run 2026-06-15 03:00Z" in found["nightly"].said


async def test_a_house_that_has_just_been_made_is_not_called_ill_for_its_first_runs(
    database: Database, conn: Connection, tmp_path: Path
) -> None:
    house = House(database, conn, tmp_path)
    await conn.execute("UPDATE schema_migrations SET applied_at = $1", NOW)
    for after_s, good in ((20, True), (149, True), (151, False)):  # two minutes, and jobs.jitter_seconds
        found = await lines(house, NOW + timedelta(seconds=after_s))
        assert [found[job].good for job in ("nightly", "reconcile")] == [good, good]
    assert "the first is due" in (await lines(house, NOW))["nightly"].said
    await conn.execute("INSERT INTO job_runs (job, status, reason, started_at, host) "
                       "VALUES ('nightly', 'failed', 'no room', $1, 'here')", NOW)  # fmt: skip
    found = await lines(house, NOW + timedelta(seconds=20))
    assert [found[job].good for job in ("nightly", "reconcile")] == [False, True]


async def test_the_version_is_the_one_that_the_server_calls_itself(well: House) -> None:
    number = int(await well.conn.fetchval("SHOW server_version_num"))  # 180004
    assert (await lines(well))["database"].said.startswith(f"PostgreSQL {number // 10_000}.{number % 10_000} ")


async def test_a_reader_that_keeps_a_detach_pending_and_a_lock_that_is_held_are_named(
    well: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(partitions, "ATTEMPTS", 1)
    await well.fill(OLD - timedelta(days=1))
    reader = await well.database.connect(application="a long report")
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM device_heartbeats")
    await well.nightly()
    async with held(reader, Lock.NIGHTLY, wait=False):
        found = await lines(well)
    assert not found["detaches"].good
    assert partitions.name_of(OLD - timedelta(days=1)) in found["detaches"].said
    assert "nightly by pid" in found["locks"].said
    await reader.close()


async def test_a_question_that_cannot_be_answered_is_bad_and_the_others_are_asked(well: House) -> None:
    await well.conn.execute("ALTER TABLE late_heartbeats RENAME TO gone")
    found = await lines(well)
    assert not found["late heartbeats"].good
    assert "gone" in found["late heartbeats"].said or "does not exist" in found["late heartbeats"].said
    assert found["nightly"].good


async def test_the_disk_of_the_embedded_database_is_counted_in_days(
    well: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await well.fill(NOW.date() - timedelta(days=1))
    found = await lines(well, of=config.Database())
    assert "GiB are free, " in found["disk"].said
    assert found["disk"].good
    found = await lines(well, of=config.Database(disk_reserve_bytes=2**60))
    assert not found["disk"].good
    room = disk.Room(2**40, 12, 2**20)
    monkeypatch.setattr(disk, "room_at", lambda _: room)
    found = await lines(well, of=config.Database())
    assert (found["disk"].good, "12 inodes are free" in found["disk"].said) == (False, True)


async def test_flags_that_the_configuration_only_seems_to_set_are_named(well: House) -> None:
    assert (await lines(well))["flags"].said == "fast reads for 100 %, perf_diff off"
    await flags.change(well.conn, {"rollout_percent": 10, "perf_diff": True}, "Ada", NOW, Flags())
    found = (await lines(well))["flags"]  # switched, and nothing is configured: no surprise
    assert (found.good, found.said) == (True, "fast reads for 10 %, perf_diff on")
    assert (await lines(well, reads=Reads(rollout_percent=10)))["flags"].good
    found = (await lines(well, reads=Reads(rollout_percent=50)))["flags"]
    assert not found.good
    assert "reads.rollout_percent = 50 does not count" in found.said
    assert found.remedy == "take reads.rollout_percent out, or nexhb flags set rollout_percent=50"


async def test_fast_reads_that_somebody_switched_on_again_are_well(well: House) -> None:
    await fast_reads_that_perf_diff_turned_off(well)
    await a_mismatch(well)
    assert not (await lines(well))["flags"].good
    await flags.change(well.conn, {"read_from_last_status": True}, "Ada", NOW, Flags())
    assert (await lines(well))["flags"].good


async def test_anybody_else_for_whom_heartbeats_or_jobs_wait_is_named_at_once(
    well: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "STRANGER_MOST_S", 0)
    stranger = await well.database.connect(application="psql")
    pid = stranger.get_server_pid()
    for held_up in (
        "LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE device_heartbeats IN SHARE MODE",
        "UPDATE device_last_status SET battery_pct = 1",
    ):
        async with stranger.transaction():
            await stranger.execute(held_up)
            found = (await lines(well))["locks"]
        assert not found.good
        assert f"heartbeats or jobs wait for pid {pid} (psql, idle in transaction)" in found.said
        assert found.remedy == f"SELECT pg_terminate_backend({pid})"
    assert (await lines(well))["locks"].good
    async with stranger.transaction():  # a reader keeps nobody off
        await stranger.execute("SELECT count(*) FROM device_last_status")
        assert (await lines(well))["locks"].good
    await stranger.close()


async def test_a_jobs_lock_that_a_stranger_holds_is_stuck_and_a_jobs_own_is_not(
    well: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "STRANGER_MOST_S", -1)
    for application, good in (("psql", False), ("nexhb nightly", True)):
        holder = await well.database.connect(application=application)
        async with held(holder, Lock.NIGHTLY, wait=False):
            found = (await lines(well))["locks"]
        assert found.good is good
        assert f"nightly by pid {holder.get_server_pid()} ({application}, idle)" in found.said
        await holder.close()


async def test_a_day_that_is_detached_is_named(well: House) -> None:
    today = partitions.name_of(NOW.date())
    await well.conn.execute(f"ALTER TABLE device_heartbeats DETACH PARTITION {today}")
    found = (await lines(well))["days ahead"]
    assert not found.good
    assert f"{NOW.date()} is detached" in found.said


async def test_the_doctor_says_whether_devices_that_enrol_at_nexmdm_are_known_here(
    well: House, empty_database: Database
) -> None:
    async def line(source: str | None) -> Line:
        legacy = config.Legacy(source=SecretStr(source) if source else None)
        settings = Settings(data_dir=well.folder, database=ELSEWHERE, legacy=legacy)
        return next(one for one in await doctor.examine(well.conn, settings, VISIT) if one.name == "NexMDM")

    assert await line(None) == Line("NexMDM", True, "nothing was imported, and legacy.source is not set")
    await well.conn.execute(
        "INSERT INTO job_runs (job, started_at, ended_at, status, host) VALUES ('import', $1, $1, 'completed', 'x')",
        NOW,
    )
    unset = await line(None)
    assert unset.good
    assert f"the last import was {NOW:%Y-%m-%d %H:%MZ}" in unset.said
    assert "third heartbeat, which is 20 minutes" in unset.said
    away = await line("postgresql://nobody:geheim@127.0.0.1:1/nexmdm")
    assert (away.good, "unknown tokens are answered 503" in away.said, "geheim" in away.said) == (False, True, False)
    assert (await line(empty_database.dsn)).said.endswith("no NexMDM database: devices has no alias, id, token_hash.")
    source = await empty_database.connect(application="test source")
    await MONOLITHIC.create(source, NOW, NOW)
    await source.close()
    there = await line(empty_database.dsn)
    assert (there.good, there.said.endswith(" is asked for tokens that nexhb does not know")) == (True, True)
