"""A heartbeat that was sent to both systems is one row, though NexMDM stamped its arrival; what the report counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bench.nexmdm import MONOLITHIC, PARTITIONED, Version, add_device
from nexhb import audit, devices
from nexhb.db import Database
from tests.conftest import Agent, StartDaemon, example
from tests.integration.moves import Move, moving

SECOND = timedelta(seconds=1)


def as_nexmdm_has_it(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The columns that NexMDM makes of a heartbeat."""
    system, memory = body["system"], body["memory"]
    return {
        "ip": body["network"]["ip"], "battery_pct": int(body["battery"]["pct"]), "plugged": body["battery"]["charging"],
        "temp_c": int(body["battery"]["temperature_c"]), "network_type": body["network"]["transport"],
        "uptime_s": int(system["uptime_seconds"]), "ram_used_mb": int(memory["total_ram_mb"] - memory["avail_ram_mb"]),
        "unity_pkg_version": "2.1.0", "unity_running": True, "agent_version": body["app_version"],
    } | changes  # fmt: skip


@pytest.mark.parametrize("version", [MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
async def test_a_heartbeat_that_was_sent_to_both_is_one_row(
    start_daemon: StartDaemon, empty_database: Database, version: Version
) -> None:
    """NexMDM stamps the arrival: the same heartbeat, made 47 s before, was two rows after the import."""
    nexhb = await start_daemon()
    now = datetime.now(UTC)
    conn = await nexhb.database.connect(application="test")
    async with moving(version, empty_database, conn, now) as move:
        token = devices.new_token()
        await add_device(move.source, "kiosk-1", token)
        await move.run(days=1)
        agent = Agent(nexhb, "kiosk-1", token)
        made = now - timedelta(minutes=10)
        body = example(made, device_id="kiosk-1")
        assert (await agent.send(made)).status == 200
        values = as_nexmdm_has_it(body)
        await move.at(now - made - 47 * SECOND, **values)  # a copy
        await move.at(now - made - 80 * SECOND, **values)  # and again, as its answer was lost
        for n, (column, value) in enumerate({"uptime_s": 5, "battery_pct": 1, "ip": "10.9.9.9", "temp_c": 1}.items()):
            await move.at(now - made - (100 + 20 * n) * SECOND, **values | {column: value})  # others
        await move.at(now - made - 200 * SECOND, **values | {"uptime_s": None})  # nothing to tell it by
        await move.at(now - made + timedelta(minutes=6), **values)  # it came before ours was made
        found = await move.run(days=1)
        counts = [found.total(name) for name in ("source", "written_now", "deduplicated", "copies", "missing")]
        assert (counts, found.why_not) == ([8, 6, 2, 2, 0], [])
        assert len(await move.history()) == 7
        # Found again by their count: nothing is read a second time.
        again = await move.run(days=1)
        assert (again.total("read_now"), again.total("copies"), again.why_not) == (0, 2, [])
        assert (await audit.audit(conn, made.date())).missing == 0
    await conn.close()


async def test_duplicates_are_those_of_the_rows_that_the_source_has_now(move_of: Move) -> None:
    """Rows that NexMDM had deleted after their import were subtracted from the duplicates: 8 were printed, not 12."""
    for second in range(6):  # three buckets, twice each
        await move_of.at(timedelta(minutes=30) - second * 5 * SECOND)
    first = await move_of.run()
    assert (first.total("written"), first.total("deduplicated")) == (3, 3)
    await move_of.at(timedelta(minutes=20))
    await move_of.run()
    ts = (await move_of.history())[0]["ts"]
    assert (
        await move_of.source.execute("DELETE FROM device_heartbeats WHERE ts = $1", ts.replace(tzinfo=None))
        == "DELETE 1"
    )
    await move_of.source.execute(
        "DELETE FROM device_heartbeats WHERE ts > $1", (move_of.now - timedelta(minutes=21)).replace(tzinfo=None)
    )
    found = await move_of.run()
    assert [found.total(name) for name in ("source", "written", "deduplicated", "missing")] == [5, 4, 2, 0]
    assert found.why_not == []


@pytest.fixture
async def move_of(empty_database: Database, database: Database, now: datetime) -> Any:
    """An empty one, with kiosk-1, at a full minute."""
    conn = await database.connect(application="test")
    async with moving(MONOLITHIC, empty_database, conn, now.replace(second=0, microsecond=0)) as one:
        await add_device(one.source, "kiosk-1", devices.new_token())
        yield one
    await conn.close()
