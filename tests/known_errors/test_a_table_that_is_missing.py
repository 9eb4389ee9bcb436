"""A table of nexhb's that is not there, and a statement that fails for every row: neither is a missing day or a bad
heartbeat. Both were taken for one: 401 for a good token, 422 for a good heartbeat, which its device then drops."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import pytest

from nexhb import sql
from nexhb.db import Connection
from nexhb.errors import DatabaseUnfit
from tests.conftest import Agent, Nexhb, StartDaemon

BUCKET = timedelta(seconds=10)
# What a heartbeat's way needs.
ON_THE_WAY = ("device_last_status", "device_heartbeats", "heartbeat_labels", "ingest_ledger")


@asynccontextmanager
async def without(conn: Connection, table: str) -> AsyncIterator[None]:
    """That table has another name for the block."""
    await conn.execute(f"ALTER TABLE {table} RENAME TO put_aside")
    yield
    await conn.execute(f"ALTER TABLE put_aside RENAME TO {table}")


async def reasons(nexhb: Nexhb) -> list[str]:
    """Why it is not ready."""
    found: list[str] = (await (await nexhb.http.get(f"{nexhb.url}/readyz")).json())["reasons"]
    return found


async def test_a_table_that_is_gone_is_503_by_its_name_until_it_is_back(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent, at = await nexhb.agent(), now
    assert (await agent.send(at)).status == 200
    for table in ON_THE_WAY:
        at -= BUCKET
        async with without(conn, table):
            answer = await agent.send(at, network={"transport": "wifi", "ssid": f"without {table}"})
            # The rows go straight into their day's table, which is there.
            assert answer.status == (200 if table == "device_heartbeats" else 503), (table, answer)
            async with asyncio.timeout(10):
                while not any(table in reason for reason in await reasons(nexhb)):
                    await asyncio.sleep(0.02)
            assert (await nexhb.http.get(f"{nexhb.url}/v1/devices/{agent.device_id}")).status != 404
        async with asyncio.timeout(20):
            while (answer := await agent.send(at)).status != 200:
                assert answer.status == 503, (table, answer)
                await asyncio.sleep(0.02)
    assert len(await nexhb.rows("SELECT * FROM device_heartbeats")) == 1 + len(ON_THE_WAY)


async def test_no_token_is_401_while_the_token_store_is_missing(
    nexhb: Nexhb, conn: Connection, now: datetime, start_daemon: StartDaemon
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    for table in ("device_tokens", "devices", "legacy_tokens"):
        async with without(conn, table):
            for token in ("x" * 43, "y" * 43):
                answer = await Agent(nexhb, "x", token + table).send(now)
                assert answer.status == 503, (table, answer)
            with pytest.raises(DatabaseUnfit, match=f"missing: {table}"):
                await start_daemon()
    assert (await Agent(nexhb, "x", "z" * 43).send(now)).status == 401


async def test_a_day_that_was_dropped_by_hand_is_made_again(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200
    await conn.execute(f"DROP TABLE device_heartbeats_{now:%Y%m%d}")
    assert (await agent.send(now - BUCKET)).status == 200


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        ("UPDATE ingest_ledger SET written = 9223372036854775807", "UPDATE ingest_ledger SET written = 1"),  # 22003
        (
            "ALTER TABLE device_last_status ADD CONSTRAINT odd CHECK (device_no < 0) NOT VALID",
            "ALTER TABLE device_last_status DROP CONSTRAINT odd",
        ),
        (
            "ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (bucket < 0) NOT VALID",
            "ALTER TABLE device_heartbeats DROP CONSTRAINT odd",
        ),
    ],
)
async def test_what_the_database_refuses_of_everybody_is_503(
    nexhb: Nexhb, conn: Connection, now: datetime, spoil: str, mend: str
) -> None:
    agent, other = await nexhb.agent(), await nexhb.agent()
    assert (await agent.send(now)).status == 200
    await conn.execute(spoil)
    many = [agent.send(now - n * BUCKET) for n in range(1, 20)] + [other.send(now - n * BUCKET) for n in range(20)]
    found = {answer.status for answer in await asyncio.gather(*many)}
    assert 503 in found
    assert found <= {200, 503}  # a new connection has a row of the ledger of its own
    await conn.execute(mend)
    async with asyncio.timeout(20):
        while (answer := await agent.send(now - BUCKET)).status != 200:
            assert answer.status == 503
            await asyncio.sleep(0.02)


async def test_what_it_refuses_of_one_is_that_ones_alone(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """Of somebody's own constraint on a value, the others of a batch know nothing."""
    agents = [await nexhb.agent() for _ in range(8)]
    await conn.execute("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct < 50)")
    pct = [10.0, 20.0, 99.0, 30.0, 40.0, 98.0, 1.0, 2.0]
    sent = [agent.send(now, battery={"pct": one, "charging": True}) for agent, one in zip(agents, pct, strict=True)]
    assert [answer.status for answer in await asyncio.gather(*sent)] == [422 if one > 50 else 200 for one in pct]


def test_the_list_of_tables_is_the_schemas() -> None:
    schema = (sql.root() / "schema.sql").read_text()
    made = set(re.findall(r"^CREATE (?:TABLE|VIEW) (\w+)", schema, re.MULTILINE))
    listed = set(re.findall(r"'(\w+)'", sql.queries("db")["missing_tables"]))
    assert listed == made
