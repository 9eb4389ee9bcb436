"""A missing table of nexhb, and a statement that fails for every row, are not mistaken for a missing day or a bad
heartbeat. Formerly, nexhb did so: a valid token received 401, and a valid heartbeat received 422, after which its
device drops the heartbeat."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import pytest

from nexhb.errors import DatabaseUnfit
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection
from tests.conftest import SOON_S, Agent, Nexhb, StartDaemon

BUCKET = timedelta(seconds=10)
# The tables that storing a heartbeat needs.
ON_THE_WAY = ("device_last_status", "device_heartbeats", "heartbeat_labels", "ingest_ledger")


@asynccontextmanager
async def without(conn: Connection, table: str) -> AsyncIterator[None]:
    """Give the table another name within the block."""
    await conn.execute(f"ALTER TABLE {table} RENAME TO put_aside")
    yield
    await conn.execute(f"ALTER TABLE put_aside RENAME TO {table}")


async def reasons(nexhb: Nexhb) -> list[str]:
    """Return the reasons why the daemon is not ready."""
    listed: list[str] = (await (await nexhb.http.get(f"{nexhb.url}/readyz")).json())["reasons"]
    return listed


async def test_a_missing_table_is_503_with_its_name_until_it_is_back(
    nexhb: Nexhb, conn: Connection, now: datetime
) -> None:
    agent, at = await nexhb.agent(), now
    assert (await agent.send(at)).status == 200
    for table in ON_THE_WAY:
        at -= BUCKET
        async with without(conn, table):
            answer = await agent.send(at, network={"transport": "wifi", "ssid": f"without {table}"})
            # The rows are written directly into the table of their day, which exists.
            assert answer.status == (200 if table == "device_heartbeats" else 503), (table, answer)
            async with asyncio.timeout(SOON_S):
                while not any(table in reason for reason in await reasons(nexhb)):
                    await asyncio.sleep(0.02)
            assert (await nexhb.http.get(f"{nexhb.url}/v1/devices/{agent.device_id}")).status != 404
        assert (await agent.retry(at)).status == 200
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


async def test_a_day_that_was_dropped_by_hand_is_created_again(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
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
async def test_an_error_for_every_row_is_503(
    nexhb: Nexhb, conn: Connection, now: datetime, spoil: str, mend: str
) -> None:
    agent, other = await nexhb.agent(), await nexhb.agent()
    assert (await agent.send(now)).status == 200
    await conn.execute(spoil)
    many = [agent.send(now - n * BUCKET) for n in range(1, 20)] + [other.send(now - n * BUCKET) for n in range(20)]
    statuses = {answer.status for answer in await asyncio.gather(*many)}
    assert 503 in statuses
    assert statuses <= {200, 503}  # 200 is possible, because a new connection has its own row of the ledger
    await conn.execute(mend)
    assert (await agent.retry(now - BUCKET)).status == 200


async def test_an_error_for_one_row_concerns_only_that_row(nexhb: Nexhb, conn: Connection, now: datetime) -> None:
    """A foreign constraint on a value does not affect the other heartbeats of a batch."""
    agents = [await nexhb.agent() for _ in range(8)]
    await conn.execute("ALTER TABLE device_heartbeats ADD CONSTRAINT odd CHECK (battery_pct < 50)")
    pct = [10.0, 20.0, 99.0, 30.0, 40.0, 98.0, 1.0, 2.0]
    sent = [agent.send(now, battery={"pct": one, "charging": True}) for agent, one in zip(agents, pct, strict=True)]
    assert [answer.status for answer in await asyncio.gather(*sent)] == [422 if one > 50 else 200 for one in pct]


def test_the_list_of_tables_agrees_with_the_schema() -> None:
    schema = (sql.root() / "schema.sql").read_text()
    made = set(re.findall(r"^CREATE (?:TABLE|VIEW) (\w+)", schema, re.MULTILINE))
    listed = set(re.findall(r"'(\w+)'", sql.queries("connections")["missing_tables"]))
    assert listed == made
