"""The servers that nexhb is compared with, each as its own process on a real database, and a minimal comparison."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest

from bench.fleet import MICROS, body_us, make_fleet
from bench.peers import process
from bench.runs import compare as f
from bench.runs.steady import Steady
from nexhb.postgres import connections

for _module in ("fastapi", "uvicorn", "httptools", "sqlalchemy", "psycopg"):
    pytest.importorskip(_module, reason="the extra compare is not installed: pip install -e '.[compare]'")

from bench.peers import fastapi_insert, nexmdm  # noqa: E402 - of the extra

FLEET = make_fleet(2, seed=5)


async def _nexmdm(conn: asyncpg.Connection) -> None:
    await nexmdm.prepare(conn, FLEET, 1, datetime.now(UTC) - timedelta(days=1))


async def _fastapi(conn: asyncpg.Connection) -> None:
    await fastapi_insert.prepare(conn, FLEET)


PEERS: dict[str, tuple[str, tuple[str, ...], Callable[[asyncpg.Connection], Awaitable[None]], str]] = {
    "FastAPI": ("fastapi_insert", ("--pool", "2"), _fastapi, "heartbeats"),
    "NexMDM": ("nexmdm", (), _nexmdm, "device_heartbeats"),
    "NexMDM without bcrypt": ("nexmdm", ("--no-bcrypt",), _nexmdm, "device_heartbeats"),
}


@pytest.mark.parametrize("peer", PEERS)
async def test_a_peer_keeps_one_heartbeat_a_bucket_and_knows_its_tokens(
    empty_database: connections.Database, peer: str
) -> None:
    module, words, prepare, table = PEERS[peer]
    conn = await asyncpg.connect(empty_database.dsn)
    await prepare(conn)
    raw = body_us(FLEET[0], int(time.time()) // 60 * 60 * MICROS, 1)
    with process.running(module, "--dsn", empty_database.dsn, *words) as server:
        async with aiohttp.ClientSession() as session:
            answers = [await _post(session, server, raw, FLEET[0].token) for _ in range(2)]
            status, _ = await _post(session, server, raw, "no token of ours")
    assert answers == [
        (200, {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": False}),
        (200, {"ok": True, "next_heartbeat_seconds": 60, "deduplicated": True}),
    ]
    assert status == 401
    assert [row["device_id"] for row in await conn.fetch(f"SELECT device_id FROM {table}")] == [FLEET[0].device_id]
    await conn.close()


async def _post(session: aiohttp.ClientSession, server: process.Server, raw: bytes, token: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    async with session.post(f"{server.url}/v1/heartbeat", data=raw, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_comparison_measures_every_part_and_finds_every_row() -> None:
    plan = replace(
        f.Compare().quicker(),
        devices=50,
        steady=Steady(devices=50, interval_s=1, jitter_s=0, duration_s=1),
        connections=(2, 4),
        peer_connections=4,
        hashed_devices=2,
        hashed_connections=1,
        round_s=2.5,
        warm_s=0.1,
    )
    compared, trials = await plan.measure(lambda _: None)
    assert [trial.check.ok for trial in trials] == [True, True]
    assert trials[1].check.lines[0].found > 1_000
    assert compared.lost_by_peers == 0
    assert all(each.rate_per_s > 0 for each in compared.lanes.values())
    servers = [f.BARE, f.NEXHB, f.FASTAPI, f.NEXMDM, f.NEXMDM_BCRYPT, *f.FORMS]
    assert {name for name, _ in compared.lanes} == set(servers)
    assert compared.copies[0] > 1_000
