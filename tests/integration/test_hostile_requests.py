"""Errors that were found by deliberately breaking nexhb: keys in the log, a read-only database that seemed ready, 500s
from query parameters and an Expect header, a device name that broke the operator's list, a queue without a content
type."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from nexhb import log, partitions
from nexhb.devices import csv_import, registry, store, tokens
from nexhb.errors import BadInput
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon, timestamp
from tests.support import forks
from tests.support.hostile import raw


async def test_an_invalid_http_request_leaves_no_key_in_the_log(nexhb: Nexhb) -> None:
    lines = io.StringIO()
    log.setup("info", lines)
    for header in (f"x-admin : {ADMIN_KEY}", f"x-admin: \x01{ADMIN_KEY}", f"Authorization: Bearer \x01{ADMIN_KEY}"):
        assert b" 400 " in await raw(nexhb, f"GET /v1/fleet HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
    assert "http.bad_request_line" in lines.getvalue()
    assert ADMIN_KEY not in lines.getvalue()
    assert "Traceback" not in lines.getvalue()


@pytest.mark.usefixtures("machine_time")  # PostgreSQL returns who locks the table of its own day
@pytest.mark.parametrize("table", ["device_last_status", "today's"])
async def test_a_daemon_whose_tables_are_locked_is_not_ready_until_they_are_unlocked(
    nexhb: Nexhb, conn: Connection, now: datetime, table: str
) -> None:
    """Formerly, the daemon reported ready between two batches, and each heartbeat received its 503 only after six
    seconds."""
    assert (await (await nexhb.agent()).send(now)).status == 200
    agent = await nexhb.agent()  # another device, so that no heartbeat is a duplicate
    table = partitions.table_name(now.date()) if table == "today's" else table
    async with conn.transaction():
        await conn.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")
        assert (await agent.send(now)).status == 503
        for _ in range(20):
            reasons = (await nexhb.get("/readyz", 503))["reasons"]
            await asyncio.sleep(0.05)
        assert f"{table} is locked by pid {conn.get_server_pid()} (test)" in reasons[0]
    assert (await agent.retry(now)).status == 200


@pytest.fixture
async def read_only(cluster: str) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Make the whole server read-only by its configuration, as providers do when a disk is full, or undo it."""

    async def make(value: str) -> None:
        conn = await asyncpg.connect(cluster)
        await conn.execute("SET default_transaction_read_only = off")
        await conn.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        await conn.execute("SELECT pg_reload_conf()")
        await conn.close()
        async with asyncio.timeout(SOON_S):
            while True:  # the setting applies to new connections
                fresh = await asyncpg.connect(cluster)
                current = await fresh.fetchval("SHOW default_transaction_read_only")
                await fresh.close()
                if current == value:
                    return

    yield make
    await make("off")


async def test_a_read_only_server_is_not_ready(
    nexhb: Nexhb, conn: Connection, now: datetime, read_only: Callable[[str], Awaitable[None]]
) -> None:
    """The server's own configuration is respected, unlike the defaults of a role or a database."""
    agent = await nexhb.agent()
    await read_only("on")
    await conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'nexhb%'")
    async with asyncio.timeout(SOON_S):
        while (ready := await nexhb.http.get(f"{nexhb.url}/readyz")).status != 503:
            pass
    assert "read-only" in (await ready.json())["reasons"][0]
    assert (await agent.send(now)).status == 503
    await read_only("off")
    assert (await agent.retry(now)).status == 200


@pytest.mark.parametrize("query", ["to=0001-01-01T00:00:00Z", "from=0001-01-01T00:00:00Z", "to=9999-12-31T23:59:59Z"])
async def test_year_1_and_year_9999_are_accepted_as_times(nexhb: Nexhb, now: datetime, query: str) -> None:
    agent = await nexhb.agent()
    await agent.send(now)
    history = await nexhb.get(f"/v1/devices/{agent.device_id}/heartbeats?{query}")
    assert len(history["heartbeats"]) == (1 if "from" in query else 0)


async def test_an_undecodable_expect_header_is_417(nexhb: Nexhb) -> None:
    assert b" 417 " in await raw(nexhb, b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: \xff\r\n\r\n")
    agent = await nexhb.agent()
    head = (
        f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    answer = await raw(nexhb, head.encode(), b"{}")
    assert answer.startswith(b"HTTP/1.1 100 Continue")
    assert b" 422 " in answer


async def test_a_queue_without_a_content_type_is_accepted(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    body = b'[{"timestamp_utc":"%s"}]' % timestamp(now).encode()
    head = (
        f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    assert b'"written":1' in await raw(nexhb, head.encode() + body)


async def test_the_last_heartbeat_of_a_queue_with_a_wrong_clock_becomes_the_status(nexhb: Nexhb) -> None:
    agent = await nexhb.agent()
    items = [f'{{"timestamp_utc":"1970-01-01T00:0{n}:00Z","battery":{{"pct":{n}}}}}' for n in range(5)]
    await agent.post(f"[{','.join(items)}]".encode(), "/v1/heartbeats")
    assert (await nexhb.get(f"/v1/devices/{agent.device_id}"))["battery_pct"] == 4


async def test_markup_in_a_name_does_not_break_the_list(nexhb: Nexhb, now: datetime, tmp_path: Path) -> None:
    agent = await nexhb.agent()
    await agent.send(now, alias="[/x]\x1b[31m")
    done = await asyncio.to_thread(
        forks.run,
        "nexhb",
        ["devices", "list"],
        env={"NEXHB_DATABASE__URL": nexhb.database.dsn, "NEXHB_DATA_DIR": str(tmp_path), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert "[/x]" in done.stdout
    assert "\x1b[31m" not in done.stdout


async def test_the_name_of_a_list_is_not_accepted_as_a_device_id(conn: Connection, tmp_path: Path) -> None:
    for name in ("offline", "unity-down"):
        with pytest.raises(BadInput, match="name of a list"):
            await registry.add(conn, name, None)
    file = tmp_path / "devices.csv"
    file.write_text("device_id,token\na,b,c,d\n")
    with pytest.raises(BadInput, match="more columns"):
        await csv_import.import_csv(conn, file)


async def test_unknown_tokens_do_not_queue_while_the_token_store_hangs(
    start_daemon: StartDaemon, conn: Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lookups together wait no longer than one of them; one after another they would take 80 s."""
    monkeypatch.setattr(store, "LOOKUP_TIMEOUT_S", 1.0)
    nexhb = await start_daemon()
    agents = [Agent(nexhb, "stray", tokens.new_token()) for _ in range(80)]
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_tokens IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(SOON_S):
            answers = await asyncio.gather(*(agent.send(now - timedelta(minutes=1)) for agent in agents))
    assert {answer.status for answer in answers} == {503}
