"""nexhb backfill: every device's last status from the history, while the fleet keeps sending."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from nexhb import partitions
from nexhb.cli import backfill as command
from nexhb.config import Settings
from nexhb.devices import registry
from nexhb.jobs.registry import Jobs
from nexhb.postgres import locks
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock
from tests.support.commands import nexhb
from tests.support.history import DAY, MINUTE, NOW, add_devices, add_history, numbers, status_of, turn_back


def nothing(*_: int) -> None:
    """Ignore the progress."""


@pytest.fixture
async def fleet(conn: Connection) -> Connection:
    """A database with the ten days before NOW, four labels and no devices."""
    await partitions.ensure(conn, partitions.days_between((NOW - 10 * DAY).date(), (NOW + DAY).date()))
    await conn.execute(
        """INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid)
        VALUES ('', '', '', ''), ('1.0.9', '2.1.0', 'wifi', 'Store-42'), ('1.0.9', '', 'cellular', ''),
               ('1.1.0', '2.2.0', 'wifi', 'Store-7')"""
    )
    return conn


@pytest.fixture
def jobs(database: Database, tmp_path: Path) -> Jobs:
    """The daemon's jobs, with a clock that stands at NOW."""
    return Jobs(database, Settings(data_dir=tmp_path), lambda: NOW)


async def test_each_device_gets_its_newest_heartbeat_of_the_given_days(fleet: Connection, jobs: Jobs) -> None:
    await add_devices(fleet, 30)
    await add_history(fleet, 9 * DAY)
    await add_history(fleet, 6 * DAY, 5 * DAY, which="n > 10")
    await add_history(fleet, 20 * MINUTE, which="n > 20")
    run = await jobs.backfill(7, nothing)
    assert run.status == "completed"
    assert await numbers(fleet, "SELECT device_no FROM device_last_status ORDER BY 1") == list(range(11, 31))
    assert (await status_of(fleet, 15))["last_ts"] == NOW - 5 * DAY
    assert (await status_of(fleet, 25))["last_ts"] == NOW - 20 * MINUTE
    expected = {"checked": 30, "updated": 20, "devices": 20, "active": 10}
    assert {name: run.counts[name] for name in expected} == expected
    assert (run.counts["oldest"], run.counts["newest"]) == (NOW - 5 * DAY, NOW - 20 * MINUTE)


async def test_newer_statuses_are_kept_and_a_second_run_changes_nothing(fleet: Connection, jobs: Jobs) -> None:
    await add_devices(fleet, 10)
    await add_history(fleet, 2 * DAY)
    assert (await jobs.backfill(7, nothing)).counts["updated"] == 10
    await turn_back(fleet, -DAY, which="n <= 5")  # these statuses are newer than the history
    await turn_back(fleet, DAY, which="n > 5")
    assert (await jobs.backfill(7, nothing)).counts["updated"] == 5
    assert (await status_of(fleet, 1))["last_ts"] == NOW - DAY
    assert (await status_of(fleet, 9))["last_ts"] == NOW - 2 * DAY
    assert (await jobs.backfill(7, nothing)).counts["updated"] == 0


async def test_a_backfill_reports_its_progress_and_a_revoked_device_stays_revoked(
    fleet: Connection, jobs: Jobs
) -> None:
    await add_devices(fleet, 2_500)
    await add_history(fleet, DAY)
    await registry.revoke(fleet, "kiosk-7", NOW)
    progress: list[tuple[int, ...]] = []
    await jobs.backfill(7, lambda *how_far: progress.append(how_far))
    assert progress == [(1_000, 2_500, 1_000), (2_000, 2_500, 2_000), (2_500, 2_500, 2_500)]
    assert (await status_of(fleet, 7))["status"] == "revoked"


async def test_no_status_becomes_older_during_live_writes(fleet: Connection, jobs: Jobs, database: Database) -> None:
    await add_devices(fleet, 3_000)
    await add_history(fleet, DAY)
    done = asyncio.Event()

    async def write() -> int:
        rounds = 0
        async with database.connected(application="test writer") as conn:
            while not done.is_set():
                await conn.execute(
                    """INSERT INTO device_last_status AS s (device_no, device_id, last_ts, received_at, heard_at)
                    SELECT n, 'kiosk-' || n, $1, $1, $1 FROM generate_series(1, 3000) n
                    ON CONFLICT (device_no) DO UPDATE SET last_ts = excluded.last_ts, received_at = excluded.last_ts
                    WHERE excluded.last_ts > s.last_ts""",
                    NOW + rounds * timedelta(seconds=1),
                )
                rounds += 1
        return rounds

    writer = asyncio.create_task(write())
    for _ in range(3):
        assert (await jobs.backfill(7, nothing)).status == "completed"
    done.set()
    last = NOW + (await writer - 1) * timedelta(seconds=1)
    assert await fleet.fetchval("SELECT count(*) FROM device_last_status WHERE last_ts < $1", last) == 0


# ---- the command ------------------------------------------------------------------------------------------------


async def test_the_command_prints_the_output_of_the_old_system_and_the_next_step(
    fleet: Connection, database: Database, tmp_path: Path
) -> None:
    await add_devices(fleet, 3)
    code, out, err = await nexhb(database, tmp_path, "backfill", "--days", "90")
    assert (code, err) == (0, "devices: 3 of 3, 0 rows written\n")
    for words in ("devices in device_last_status  0", "active in the last hour", "oldest", "newest", command.NEXT_STEP):
        assert words in out
    code, out, _ = await nexhb(database, tmp_path, "backfill", "--json")
    shown: dict[str, Any] = orjson.loads(out)
    assert (code, shown["status"], shown["days"], shown["checked"]) == (0, "completed", 7, 3)


async def test_a_held_lock_causes_exit_code_3_and_at_most_ninety_days_are_accepted(
    conn: Connection, database: Database, tmp_path: Path
) -> None:
    async with locks.held(conn, Lock.BACKFILL, wait=False):
        code, out, _ = await nexhb(database, tmp_path, "backfill")
    assert (code, out) == (3, "backfill: skipped (lock_held)\n")
    assert (await nexhb(database, tmp_path, "backfill", "--days", "91"))[0] == 2
