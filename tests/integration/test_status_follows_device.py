"""The last status holds the device's name and revocation, whoever changes them and whenever."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from nexhb.devices import csv_import, registry, tokens
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S, Agent, Nexhb

HOUR = timedelta(hours=1)
BEGIN = """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at)
    VALUES (1, 'kiosk-1', $1, $1, $1)"""


async def listed(nexhb: Nexhb) -> list[str | None]:
    """Return the aliases in the offline list."""
    return [row["alias"] for row in (await nexhb.get("/v1/devices/offline"))["devices"]]


async def test_a_name_given_before_the_first_heartbeat_is_listed(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = Agent(nexhb, "kiosk-1", await registry.add(conn, "kiosk-1", "Store 1"))
    assert (await agent.live(now - HOUR, alias=None)).status == 200
    assert await listed(nexhb) == ["Store 1"]


async def test_a_new_name_is_listed_no_matter_who_gives_it(
    nexhb: Nexhb, conn: Connection, now: datetime, tmp_path: Path
) -> None:
    agent = await nexhb.agent("kiosk-1")
    assert (await agent.live(now - HOUR, alias="by heartbeat")).status == 200
    assert await listed(nexhb) == ["by heartbeat"]
    assert (await agent.live(now - HOUR / 2, alias="by the next")).status == 200
    assert await listed(nexhb) == ["by the next"]
    table = tmp_path / "devices.csv"
    table.write_text(f"device_id,alias,token\nkiosk-1,by import,{tokens.new_token()}\n")
    await csv_import.import_csv(conn, table)
    assert await listed(nexhb) == ["by import"]
    await conn.execute("UPDATE devices SET alias = 'by hand'")
    assert await listed(nexhb) == ["by hand"]
    await conn.execute("UPDATE devices SET alias = NULL")
    assert await listed(nexhb) == [None]


async def test_only_a_devices_first_heartbeat_locks_its_row_in_devices(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent("kiosk-1")
    await agent.live(now - 2 * HOUR)
    locked_by = await conn.fetchval("SELECT xmax FROM devices")
    assert locked_by != 0
    assert (await agent.live(now - HOUR)).status == 200
    assert await conn.fetchval("SELECT xmax FROM devices") == locked_by


@pytest.mark.parametrize("was", ["ok", "inactive"])
async def test_a_revocation_in_sql_removes_the_device_from_the_lists_until_it_is_undone(
    nexhb: Nexhb, conn: Connection, now: datetime, was: str
) -> None:
    await (await nexhb.agent("kiosk-1")).live(now - HOUR)
    await conn.execute("UPDATE device_last_status SET status = $1", was)
    await conn.execute("UPDATE devices SET revoked_at = now()")
    assert await conn.fetchval("SELECT status FROM device_last_status") == "revoked"
    assert await listed(nexhb) == []
    await conn.execute("UPDATE devices SET revoked_at = NULL")
    assert await conn.fetchval("SELECT status FROM device_last_status") == "ok"
    assert len(await listed(nexhb)) == 1


async def test_a_first_heartbeat_concurrent_with_a_revocation_leaves_the_status_revoked(
    database: Database, conn: Connection, now: datetime
) -> None:
    await registry.add(conn, "kiosk-1", "Store 1")
    other = await database.connect(application="test", lock_timeout="5000")
    try:
        async with conn.transaction():
            await registry.revoke(conn, "kiosk-1", now)
            beginning = asyncio.create_task(other.execute(BEGIN, now))
            await waits(conn, other)
        await beginning
        assert await conn.fetchval("SELECT status FROM device_last_status") == "revoked"
        await registry.rotate(conn, "kiosk-1")
        await conn.execute("DELETE FROM device_last_status")
        async with other.transaction():
            await other.execute(BEGIN, now)
            revoking = asyncio.create_task(registry.revoke(conn, "kiosk-1", now))
            await waits(other, conn)
        await revoking
        assert await conn.fetchval("SELECT status FROM device_last_status") == "revoked"
    finally:
        other.terminate()


async def waits(watcher: Connection, waiting: Connection) -> None:
    """Wait until the other connection's statement waits for a lock that the watcher holds."""
    async with asyncio.timeout(SOON_S):
        while watcher.get_server_pid() not in await watcher.fetchval(
            "SELECT pg_blocking_pids($1)", waiting.get_server_pid()
        ):
            await asyncio.sleep(0.01)


async def test_the_migration_copies_existing_aliases_and_revocations(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    """Run the migration's statements on a last status as it was before the migration."""
    await (await nexhb.agent("kiosk-1")).live(now - HOUR, alias="Store 1")
    await (await nexhb.agent("kiosk-2")).live(now - HOUR, alias="Store 2")
    await conn.execute(
        """DROP TRIGGER devices_tell_last_status ON devices; DROP FUNCTION tell_last_status();
        DROP TRIGGER last_status_asks_device ON device_last_status; DROP FUNCTION ask_device();
        ALTER TABLE device_last_status DROP COLUMN alias;
        UPDATE devices SET revoked_at = now() WHERE device_id = 'kiosk-2'"""
    )
    root = Path(__file__).parents[2] / "sql" / "migrations"
    await conn.execute((root / "0006_alias_beside_status.sql").read_text(encoding="utf-8"))
    rows = await conn.fetch("SELECT alias, status FROM device_last_status ORDER BY device_id")
    assert [tuple(row) for row in rows] == [("Store 1", "ok"), ("Store 2", "revoked")]
