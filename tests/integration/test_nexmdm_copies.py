"""A heartbeat sent to both systems is one row, although NexMDM stores the time of arrival as its time; the report
counts such copies."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from bench.nexmdm import MONOLITHIC, PARTITIONED, Version
from nexhb import audit
from nexhb.devices import tokens
from nexhb.postgres.connections import Database
from tests.conftest import Agent, StartDaemon, example
from tests.support.moves import Move, moving
from tests.support.nexmdm_rows import add_device

SECOND = timedelta(seconds=1)


def as_nexmdm_has_it(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the columns that NexMDM stores for a heartbeat."""
    system, memory = body["system"], body["memory"]
    return {
        "ip": body["network"]["ip"], "battery_pct": int(body["battery"]["pct"]), "plugged": body["battery"]["charging"],
        "temp_c": int(body["battery"]["temperature_c"]), "network_type": body["network"]["transport"],
        "uptime_s": int(system["uptime_seconds"]), "ram_used_mb": int(memory["total_ram_mb"] - memory["avail_ram_mb"]),
        "unity_pkg_version": "2.1.0", "unity_running": True, "agent_version": body["app_version"],
    } | changes  # fmt: skip


@pytest.mark.parametrize("version", [MONOLITHIC, PARTITIONED], ids=lambda version: version.name)
async def test_a_heartbeat_sent_to_both_systems_is_one_row(
    start_daemon: StartDaemon, empty_database: Database, now: datetime, version: Version
) -> None:
    """NexMDM stores the time of arrival. Formerly, a heartbeat that was made 47 s before its arrival had two rows after
    the import."""
    nexhb = await start_daemon()
    conn = await nexhb.database.connect(application="test")
    async with moving(version, empty_database, conn, now) as move:
        token = tokens.new_token()
        await add_device(move.source, "kiosk-1", token)
        await move.run(days=2)
        agent = Agent(nexhb, "kiosk-1", token)
        made = now - timedelta(minutes=10)
        body = example(made, device_id="kiosk-1")
        assert (await agent.send(made)).status == 200
        values = as_nexmdm_has_it(body)
        await move.at(now - made - 47 * SECOND, **values)  # a copy
        await move.at(now - made - 80 * SECOND, **values)  # sent again because the response was lost
        for n, (column, value) in enumerate({"uptime_s": 5, "battery_pct": 1, "ip": "10.9.9.9", "temp_c": 1}.items()):
            await move.at(now - made - (100 + 20 * n) * SECOND, **values | {column: value})  # other heartbeats
        # Without uptime, a copy cannot be recognised.
        await move.at(now - made - 200 * SECOND, **values | {"uptime_s": None})
        await move.at(now - made + timedelta(minutes=6), **values)  # arrived before the heartbeat in nexhb was made
        found = await move.run(days=2)
        counts = [found.total(name) for name in ("source", "written_now", "deduplicated", "copies", "missing")]
        assert (counts, found.disagreements) == ([8, 6, 2, 2, 0], [])
        assert len(await move.history()) == 7
        # The stored count of copies suffices: nothing is read a second time.
        again = await move.run(days=2)
        assert (again.total("read_now"), again.total("copies"), again.disagreements) == (0, 2, [])
        assert (await audit.audit(conn, made.date())).missing == 0
    await conn.close()


async def test_duplicates_are_counted_among_the_rows_that_the_source_has_now(move_of: Move) -> None:
    """Formerly, rows that NexMDM deleted after their import were subtracted from the duplicates: the report said 8, not
    12."""
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
    assert found.disagreements == []


@pytest.fixture
async def move_of(empty_database: Database, database: Database, now: datetime) -> Any:
    """Provide a move from a database with kiosk-1 and no heartbeats, at a full minute."""
    conn = await database.connect(application="test")
    async with moving(MONOLITHIC, empty_database, conn, now.replace(second=0, microsecond=0)) as one:
        await add_device(one.source, "kiosk-1", tokens.new_token())
        yield one
    await conn.close()
