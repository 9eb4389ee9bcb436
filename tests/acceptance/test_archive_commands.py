"""The operator's commands for the nightly run and the archive: their output and exit codes, and what SIGKILL leaves."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import subprocess
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nexhb import partitions
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.locks import Lock, held
from tests.conftest import SOON_S
from tests.support import forks

DEVICES, ROWS = 20, 1_000


@pytest.fixture
def environment(database: Database, tmp_path: Path) -> dict[str, str]:
    """The environment variables that an operator would set."""
    return os.environ | {"NEXHB_DATA_DIR": str(tmp_path), "DATABASE_URL": database.dsn}


def nexhb(environment: dict[str, str], *arguments: str, code: int = 0) -> str:
    """Run a command and return its output."""
    done = forks.run("nexhb", arguments, env=environment, timeout=50)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def as_json(environment: dict[str, str], *arguments: str, code: int = 0) -> Any:
    """Run a command with --json and return its output, parsed."""
    return json.loads(nexhb(environment, *arguments, "--json", code=code))


async def fill(conn: Connection, day: date) -> None:
    """Create a day with 20,000 heartbeats."""
    await partitions.ensure(conn, [day])
    await conn.execute("INSERT INTO devices (device_id) SELECT 'kiosk-' || n FROM generate_series(1, $1::int) n "
                       "ON CONFLICT DO NOTHING", DEVICES)  # fmt: skip
    await conn.execute("INSERT INTO heartbeat_labels (agent_version, unity_pkg_version, network_type, ssid) "
                       "VALUES ('1.0.9', '2.1.0', 'wifi', 'Store-42') ON CONFLICT DO NOTHING")  # fmt: skip
    await conn.execute(
        """
        INSERT INTO device_heartbeats
        SELECT $1::timestamptz + n * interval '60 s', $1::timestamptz + n * interval '60.1 s', device_no,
               extract(epoch FROM $1::timestamptz)::int - 1577836800 + n * 60, 1, n * 7919 % 100003, 900, 30 + n % 10,
               n % 100, -60, true, true, false, '192.168.1.50'
        FROM generate_series(0, $2::int - 1) n, devices""",
        partitions.midnight(day),
        ROWS,
    )


async def test_an_old_day_is_archived_and_restored_by_commands(
    environment: dict[str, str], conn: Connection, tmp_path: Path
) -> None:
    day = datetime.now(UTC).date() - timedelta(days=91)
    await fill(conn, day)
    before = await conn.fetch("SELECT * FROM heartbeat_history ORDER BY device_no, bucket")

    text = nexhb(environment, "nightly", "--dry-run")
    assert f"archive   {partitions.table_name(day)}: older than" in text
    assert f"create    {datetime.now(UTC).date()}: a gap" in text
    assert "dropped 1" in nexhb(environment, "nightly")
    assert as_json(environment, "nightly")["status"] == "completed"

    [archive] = as_json(environment, "archive", "list")["archives"]
    assert (archive["state"], archive["row_count"]) == ("dropped", DEVICES * ROWS)
    assert archive["archive_url"].startswith(f"file://{tmp_path}/archive/{partitions.table_name(day)}/")
    assert f"{day}" in nexhb(environment, "archive", "list")
    assert as_json(environment, "archive", "verify", "--all") | {"archives": None} == {
        "checked": 1, "damaged": 0, "archives": None,
    }  # fmt: skip
    assert "intact, 20,000 rows" in nexhb(environment, "archive", "verify", f"{day}")

    rows = list(
        csv.DictReader(io.StringIO(nexhb(environment, "archive", "get", "--device", "kiosk-7", "--day", f"{day}")))
    )
    assert len(rows) == ROWS
    assert [row["uptime_s"] for row in rows[:3]] == ["0", "7919", "15838"]
    found = as_json(environment, "archive", "get", "--device", "kiosk-7", "--day", f"{day}")
    assert found["heartbeats"][0]["ssid"] == "Store-42"
    assert found["heartbeats"][0]["unity_running"] == "t"

    assert as_json(environment, "archive", "restore", f"{day}", "--into", "old_day")["rows"] == DEVICES * ROWS
    plain = await conn.fetch("SELECT * FROM old_day ORDER BY device_no, bucket")
    assert [dict(row) for row in plain] == [dict(row) for row in before]
    nexhb(environment, "archive", "restore", f"{day}")
    assert await conn.fetch("SELECT * FROM heartbeat_history ORDER BY device_no, bucket") == before
    assert "created" not in as_json(environment, "nightly")
    assert "will be archived again" in nexhb(environment, "archive", "restore", f"{day}", "--release")
    assert as_json(environment, "nightly")["dropped"] == 1


async def test_a_failing_command_prints_one_sentence_and_has_an_exit_code(
    environment: dict[str, str], conn: Connection, tmp_path: Path
) -> None:
    day = datetime.now(UTC).date() - timedelta(days=91)
    await fill(conn, day)
    assert "is not archived" in nexhb(environment, "archive", "restore", "2020-01-01", code=2)
    assert "is attached" in nexhb(environment, "archive", "restore", f"{day}", code=2)
    assert "a day or --all" in nexhb(environment, "archive", "verify", code=2)
    async with held(conn, Lock.NIGHTLY, wait=False), held(conn, Lock.RECONCILE, wait=False):
        assert as_json(environment, "nightly", code=3) == {"status": "skipped", "reason": "lock_held", "elapsed_ms": 0}
        assert "lock_held" in nexhb(environment, "reconcile", code=3)
        nexhb(environment, "archive", "restore", f"{day}", "--release", code=3)
    nexhb(environment, "nightly")
    [path] = (tmp_path / "archive").rglob("*.zst")
    path.write_bytes(path.read_bytes()[:-10])
    found = as_json(environment, "archive", "verify", "--all", code=1)
    assert found["damaged"] == 1
    assert "is not what was stored" in found["archives"][0]["error"]
    assert "is not what was stored" in nexhb(environment, "archive", "restore", f"{day}", code=1)
    # Nothing is restored if a byte is wrong.
    assert not await partitions.table_exists(conn, partitions.table_name(day))
    nexhb(environment, "archive", "get", "--device", "kiosk-1", "--day", f"{day}", code=1)
    assert nexhb(environment, "nightly", code=1)  # the drill of this run fails
    assert "must be file://" in nexhb(environment | {"NEXHB_ARCHIVE__URL": "ftp://x"}, "nightly", code=2)
    assert "cron" in nexhb(environment | {"NEXHB_JOBS__NIGHTLY": "at three"}, "nightly", code=2)


async def test_many_days_are_archived_only_with_yes_and_restored_as_a_range(
    environment: dict[str, str], conn: Connection, tmp_path: Path
) -> None:
    first = datetime.now(UTC).date() - timedelta(days=99)
    days = partitions.days_between(first, first + timedelta(days=8))
    await partitions.ensure(conn, days)
    assert "9 of the 9 attached days" in nexhb(environment, "nightly", code=1)
    assert "The run would stop for a confirmation" in nexhb(environment, "nightly", "--dry-run")
    assert as_json(environment, "nightly", "--yes")["dropped"] == 9

    [path] = (tmp_path / "archive" / partitions.table_name(days[2])).glob("*.zst")
    path.rename(tmp_path / "elsewhere")
    days_argument = f"{days[0]}..{days[3]}"
    found = as_json(environment, "archive", "restore", days_argument, code=1)
    assert [("error" in one, one["day"]) for one in found["days"]] == [(day == days[2], f"{day}") for day in days[:4]]
    assert found["failed"] == 1
    text = nexhb(environment, "archive", "restore", days_argument, code=1)
    assert f"{days[0]}: " in text  # this day is attached already, which does not count as a failure
    assert "4 days, 1 failed." in text
    assert "0 rows" in nexhb(environment, "archive", "restore", f"{days[4]}..{days[6]}", "--into", "some_days")
    assert "is not a range" in nexhb(environment, "archive", "restore", f"{days[3]}..{days[0]}", code=2)
    assert "is not a day" in nexhb(environment, "archive", "restore", "yesterday", code=2)
    (tmp_path / "elsewhere").rename(path)
    nexhb(environment, "archive", "restore", f"{days[0]}..{days[1]}", "--release")
    assert as_json(environment, "nightly")["dropped"] == 2


MOMENTS = {  # moment → a query that becomes true then; '' is for the moment at which the archive gets an object
    "it has begun": "SELECT count(*) > 0 FROM job_runs WHERE status = 'running' AND host <> 'an earlier run'",
    "a day is detached": "SELECT count(*) < 3 FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
    "WHERE c.relname IN (SELECT partition_name FROM hb_partitions ORDER BY range_start LIMIT 3)",
    "a day is sealed": "SELECT count(*) > 0 FROM pg_constraint WHERE conname LIKE '%_sealed'",
    "an object is stored": "",
    "a day is dropped": "SELECT count(*) > 0 FROM hb_partitions WHERE state = 'dropped'",
    "another day is dropped": "SELECT count(*) > 1 FROM hb_partitions WHERE state = 'dropped'",
}


async def killed_when(environment: dict[str, str], conn: Connection, folder: Path, moment: str) -> bool:
    """Kill a nightly run with SIGKILL at this moment. Return False if the run ended earlier."""
    await conn.execute("UPDATE job_runs SET host = 'an earlier run'")
    running = forks.start(
        "nexhb", ["nightly"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        while running.poll() is None:
            query = MOMENTS[moment]
            if await conn.fetchval(query) if query else any((folder / "archive").rglob("*.zst")):
                running.kill()
                return True
            await asyncio.sleep(0.002)
        return False
    finally:
        running.wait(SOON_S)


async def test_a_nightly_run_that_is_killed_repeatedly_loses_nothing(
    environment: dict[str, str], conn: Connection, tmp_path: Path
) -> None:
    days = [datetime.now(UTC).date() - timedelta(days=back) for back in (93, 92, 91)]
    for day in days:
        await fill(conn, day)
    before = [tuple(row) for row in await conn.fetch("SELECT device_id, ts FROM heartbeat_history ORDER BY 1, 2")]
    killed = [await killed_when(environment, conn, tmp_path, moment) for moment in MOMENTS]
    assert any(killed)
    async with asyncio.timeout(SOON_S):
        while await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"):
            await asyncio.sleep(0.05)  # until the backend of the killed run notices that its client has gone
    run = as_json(environment, "nightly")
    assert run["status"] == "completed"
    states = await conn.fetch("SELECT state FROM hb_partitions ORDER BY range_start LIMIT 3")
    assert [row["state"] for row in states] == ["dropped", "dropped", "dropped"]
    for day in days:
        nexhb(environment, "archive", "restore", f"{day}")
    after = [tuple(row) for row in await conn.fetch("SELECT device_id, ts FROM heartbeat_history ORDER BY 1, 2")]
    assert after == before
