"""People give a device its name, in nexhb or in NexMDM, and no heartbeat changes it; the alias is the device's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench.nexmdm import MONOLITHIC
from nexhb.devices import csv_import
from nexhb.devices import tokens as device_tokens
from nexhb.postgres.connections import Connection, Database
from tests.conftest import ADMIN_KEY, Agent, Nexhb
from tests.support.commands import nexhb as command
from tests.support.moves import Move, moving
from tests.support.nexmdm_rows import add_device

HOUR = timedelta(hours=1)


@pytest.fixture
async def old(empty_database: Database, conn: Connection, now: datetime) -> AsyncIterator[Move]:
    """Provide a move from an empty NexMDM database."""
    async with moving(MONOLITHIC, empty_database, conn, now - timedelta(minutes=1)) as one:
        yield one


async def names(conn: Connection) -> dict[str, tuple[str | None, str | None]]:
    """Return the name and alias of each device."""
    rows = await conn.fetch("SELECT device_id, name, alias FROM devices")
    return {row["device_id"]: (row["name"], row["alias"]) for row in rows}


async def listed(nexhb: Nexhb) -> list[Any]:
    """Return the name and alias of the only device, from each response that contains them."""
    one = await nexhb.get("/v1/devices/kiosk-1")
    lists = [await nexhb.get(f"/v1/devices{path}") for path in ("", "/offline", "/unity-down")]
    return [(row["name"], row["alias"]) for row in [one, *(row for found in lists for row in found["devices"])]]


async def test_a_name_given_in_nexmdm_outlives_every_heartbeat(
    old: Move, nexhb: Nexhb, conn: Connection, database: Database, now: datetime, tmp_path: Path
) -> None:
    """NexMDM ignores the alias of a heartbeat, and a rename in NexMDM does not reach the agent. Formerly, after one
    heartbeat to nexhb, every device therefore had the name of the day on which it was enrolled. A rename after the
    first import was not imported at all."""
    token = device_tokens.new_token()
    await add_device(old.source, "kiosk-1", token, alias="Store 42, by the door")
    assert (await old.run()).devices.renamed == 0
    agent = Agent(nexhb, "kiosk-1", token)
    for minutes, alias in ((60, "Kiosk 001"), (40, "Kiosk 001"), (20, "Kiosk 002")):
        sent = await agent.live(now - timedelta(minutes=minutes), alias=alias, unity_process_running=False)
        assert sent.status == 200
        assert await listed(nexhb) == 4 * [("Store 42, by the door", alias)]
    await old.source.execute("UPDATE devices SET alias = 'Store 42, by the window'")
    assert (await old.run()).devices.renamed == 1
    assert (await old.run()).devices.renamed == 0
    assert await listed(nexhb) == 4 * [("Store 42, by the window", "Kiosk 002")]
    async with nexhb.http.put(
        f"{nexhb.url}/ops/flags", json={"read_from_last_status": False}, headers={"x-admin": ADMIN_KEY}
    ) as off:
        assert off.status == 200
    assert await listed(nexhb) == 4 * [("Store 42, by the window", "Kiosk 002")]
    _, out, _ = await command(database, tmp_path, "devices", "list")
    assert out.splitlines()[1].split("\t")[:3] == ["kiosk-1", "Store 42, by the window", "Kiosk 002"]
    [shown] = orjson.loads((await command(database, tmp_path, "devices", "list", "--json"))[1])["devices"]
    assert (shown["name"], shown["alias"]) == ("Store 42, by the window", "Kiosk 002")


async def test_a_name_given_here_stays_until_the_device_is_renamed_in_nexmdm(
    old: Move, conn: Connection, tmp_path: Path
) -> None:
    tokens = [device_tokens.new_token() for _ in range(4)]
    for n, token in enumerate(tokens):
        await add_device(old.source, f"kiosk-{n}", token, alias=300 * "x" if n == 3 else f"Store {n}")

    async def give(**given: str) -> None:
        lines = [f"{device},{name},{tokens[int(device[-1])]}" for device, name in given.items()]
        file = tmp_path / "devices.csv"
        file.write_text("\n".join(["device_id,name,token", *(line.replace("_", "-", 1) for line in lines)]) + "\n")
        await csv_import.import_csv(conn, file)

    await give(kiosk_0="before the first import", kiosk_1="")
    await conn.execute("INSERT INTO devices (device_id, alias) VALUES ('kiosk-2', 'of an earlier version')")
    await old.run()
    assert await names(conn) == {
        "kiosk-0": ("before the first import", None), "kiosk-1": ("Store 1", None),
        "kiosk-2": ("Store 2", "of an earlier version"), "kiosk-3": (None, None),
    }  # fmt: skip
    await give(kiosk_1="given here", kiosk_2="given here too")
    await old.source.execute("UPDATE devices SET alias = 'Store 2, renamed' WHERE id = 'kiosk-2'")
    await old.run()
    found = await names(conn)
    assert [found[f"kiosk-{n}"][0] for n in range(3)] == ["before the first import", "given here", "Store 2, renamed"]


async def test_a_name_given_before_the_first_heartbeat_or_by_hand_is_listed(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent = await nexhb.agent("kiosk-1")
    await conn.execute("UPDATE devices SET name = 'first'")
    sent = await agent.live(now - HOUR, alias=None, unity_process_running=False)
    assert (sent.status, await listed(nexhb)) == (200, 4 * [("first", None)])
    await conn.execute("UPDATE devices SET name = 'second'")
    assert await listed(nexhb) == 4 * [("second", None)]
    await conn.execute("UPDATE devices SET name = NULL")
    assert await listed(nexhb) == 4 * [(None, None)]
