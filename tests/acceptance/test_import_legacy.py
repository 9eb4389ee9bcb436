"""An import from NexMDM is interrupted, continued and repeated while the fleet sends, and both sides are compared."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import nexmdm
from bench.fleet import Device, make_fleet, schedule
from bench.load import Scheduled, stream, target
from bench.nexmdm import MONOLITHIC, PARTITIONED, Version
from nexhb import audit
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from tests.conftest import Agent, Nexhb
from tests.support.nexmdm_rows import add_beat

FLEET = 200
DAYS = 7
LIVE = 100  # devices of the fleet that send to nexhb during the import
SEED = 5


class Command:
    """The command `nexhb import-legacy` as an operator runs it."""

    def __init__(self, to: Database, source: Database, folder: Path, *options: str) -> None:
        self._words = [sys.executable, "-m", "nexhb", "import-legacy", "--json", *options]
        self._environment = {
            "PATH": os.environ["PATH"], "DATABASE_URL": to.dsn, "LEGACY_DATABASE_URL": source.dsn,
            "NEXHB_DATA_DIR": str(folder),
        }  # fmt: skip

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process."""
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*self._words, env=self._environment, stdout=pipe, stderr=pipe)

    async def run(self, code: int = 0) -> dict[str, Any]:
        """Run the command; return its JSON, or its error output."""
        process = await self.start()
        out, err = await process.communicate()
        assert process.returncode == code, (process.returncode, out.decode()[:3000], err.decode()[-3000:])
        shown: dict[str, Any] = orjson.loads(out) if out else {"error": err.decode()}
        return shown


@pytest.fixture(params=[MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
def version(request: pytest.FixtureRequest) -> Version:
    """Return a version of NexMDM; a test with this fixture runs once with each version."""
    version: Version = request.param
    return version


@pytest.fixture
def fleet() -> tuple[Device, ...]:
    """Return devices with the tokens that NexMDM gave them."""
    return make_fleet(FLEET, SEED)


async def make_source(conn: Connection, version: Version, fleet: tuple[Device, ...], every: timedelta) -> int:
    """Fill NexMDM's database with a week of heartbeats up to now; return the number of heartbeats."""
    now = datetime.now(UTC)
    await version.create(conn, now - timedelta(days=DAYS), now)
    await nexmdm.add_devices(conn, [(device.device_id, device.token) for device in fleet])
    first = (now - timedelta(days=DAYS)).replace(hour=0, minute=0, second=0, microsecond=0)
    rows = await nexmdm.add_history(conn, first, now - timedelta(minutes=20), every)
    await conn.execute("VACUUM ANALYZE")
    return rows


async def interrupted(command: Command, to: Connection, rows: int) -> None:
    """Start the command, and kill it once `rows` rows are committed."""
    process = await command.start()
    while (await to.fetchval("SELECT coalesce(sum(written), 0) FROM legacy_days")) < rows:
        assert process.returncode is None
        await asyncio.sleep(0.01)
    process.kill()
    await process.communicate()


async def fingerprint(conn: Connection) -> list[Any]:
    """Return digests of all tables that an import may change."""
    return [
        await conn.fetchval(f"SELECT md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {table} t")
        for table in (
            "devices", "device_tokens", "legacy_tokens", "device_last_status", "ingest_ledger",
            "(SELECT day, written, deduplicated, source_rows FROM legacy_days)",
            "(SELECT ts, device_no, bucket, received_at FROM device_heartbeats)",
            "(SELECT partition_name, state, counted_at, frozen_at, row_count FROM hb_partitions)",
        )
    ]  # fmt: skip


@pytest.mark.usefixtures("machine_time")  # the commands use the machine's clock
async def test_a_week_is_imported_while_the_fleet_sends(
    nexhb: Nexhb, empty_database: Database, version: Version, fleet: tuple[Device, ...], tmp_path: Path
) -> None:
    source = await empty_database.connect(application="test source")
    to = await nexhb.database.connect(application="test target")
    rows = await make_source(source, version, fleet, timedelta(minutes=40 if version is MONOLITHIC else 80))

    # The devices and today's heartbeats are imported first, so that the fleet can switch to nexhb.
    first = await Command(nexhb.database, empty_database, tmp_path, "--days", "0").run()
    assert (first["devices"]["made"], first["devices"]["tokens_added"]) == (FLEET, FLEET)
    agent = Agent(nexhb, fleet[LIVE].device_id, fleet[LIVE].token)  # the token that NexMDM gave the device
    assert (await agent.send(datetime.now(UTC))).status == 200

    # The other days follow while the fleet sends; the import is killed in the middle, and run again.
    over = asyncio.Event()
    plan = schedule(LIVE, 5.0, 1.0, 50.0, SEED)
    daemon = target(nexhb.url)
    requests = Scheduled(daemon, fleet[:LIVE], plan)
    load = asyncio.create_task(stream(daemon, requests, plan.offset_us, duration_s=50.0, until=over))
    everything = Command(nexhb.database, empty_database, tmp_path, "--days", f"{DAYS}", "--rate", "1000000")
    await interrupted(everything, to, rows // 3)
    shown = await everything.run()
    over.set()
    result = (await load).result
    assert (result.refused, result.failed) == (0, 0)
    assert result.ok > 30

    # Both sides agree, in their counts and row by row.
    assert (shown["agrees"], shown["status"]) == (True, "completed")
    heartbeats = shown["heartbeats"]
    assert heartbeats["source"] == rows == heartbeats["written"]
    assert (heartbeats["deduplicated"], heartbeats["refused"], heartbeats["missing"]) == (0, 0, 0)
    assert heartbeats["read_now"] < rows  # the import continued at the point at which it was killed
    assert await differences(source, to) == set()

    # Every day agrees with its ledger, and every device has its status.
    for day in shown["days"]:
        day_audit = await audit.audit(to, datetime.fromisoformat(day["day"]).date())
        assert day_audit.missing == 0, day_audit
    assert await to.fetchval("SELECT count(*) FROM device_last_status") == FLEET
    assert shown["backfill"]["devices"] == FLEET

    # Another run changes nothing.
    before = await fingerprint(to)
    again = await everything.run()
    assert (again["heartbeats"]["read_now"], again["heartbeats"]["written_now"]) == (0, 0)
    assert (again["agrees"], again["devices"]["made"], again["devices"]["tokens_added"]) == (True, 0, 0)
    assert await fingerprint(to) == before

    # A third run imports what NexMDM has received since the second run.
    late = datetime.now(UTC) - timedelta(minutes=5)
    await add_beat(source, fleet[-1].device_id, late, battery_pct=42, network_type="cellular")
    third = await everything.run()
    assert (third["heartbeats"]["written_now"], third["agrees"]) == (1, True)
    status = await to.fetchrow("SELECT * FROM device_last_status WHERE device_id = $1", fleet[-1].device_id)
    assert status is not None
    assert (status["last_ts"], status["battery_pct"], status["network_type"]) == (late, 42, "cellular")
    await source.close()
    await to.close()


async def differences(source: Connection, to: Connection) -> set[tuple[Any, ...]]:
    """Return the rows of the source that are missing from nexhb or differ there."""
    columns = """battery_pct::int, plugged, temp_c::float8, network_type, host(ip::inet) AS ip, signal_dbm::int,
        uptime_s, ram_used_mb, unity_pkg_version, unity_running, agent_version"""
    theirs = await source.fetch(f"SELECT device_id, ts AT TIME ZONE 'UTC' AS ts, {columns} FROM device_heartbeats")
    ours = await to.fetch(f"SELECT device_id, ts, {columns} FROM heartbeat_history WHERE received_at = ts")
    return {tuple(row) for row in theirs} - {tuple(row) for row in ours}


async def test_every_version_of_nexmdm_accepts_the_queries(empty_database: Database, version: Version) -> None:
    conn = await empty_database.connect(application="test")
    await version.create(conn, datetime.now(UTC), datetime.now(UTC))
    for name, text in sql.queries("nexmdm").items():
        assert await conn.prepare(text), name
    await conn.close()
