"""The peers, each as a process of its own on a real database, and the whole comparison, as short as it can be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest

from bench.compare import found as f
from bench.fleet import body, make_fleet
from bench.peers import process
from bench.scenarios import COMPARE, STEADY_2000
from nexhb import db

for _module in ("fastapi", "uvicorn", "httptools", "sqlalchemy", "psycopg"):
    pytest.importorskip(_module, reason="the peers are of the extra compare: pip install -e '.[compare]'")

from bench.compare import contest  # noqa: E402 - its peers are of the extra
from bench.peers import fastapi_insert, nexmdm  # noqa: E402

FLEET = make_fleet(2, seed=5)


async def _nexmdm(conn: asyncpg.Connection) -> None:
    await nexmdm.prepare(conn, FLEET, 1, datetime.now(UTC) - timedelta(days=1))


async def _fastapi(conn: asyncpg.Connection) -> None:
    await fastapi_insert.prepare(conn, FLEET)


PEERS: dict[str, tuple[str, tuple[str, ...], Callable[[asyncpg.Connection], Awaitable[None]], str]] = {
    "FastAPI": ("fastapi_insert", ("--pool", "2"), _fastapi, "heartbeats"),
    "NexMDM": ("nexmdm", (), _nexmdm, "device_heartbeats"),
    "NexMDM without bcrypt, on threads": ("nexmdm", ("--no-bcrypt", "--threads"), _nexmdm, "device_heartbeats"),
}


@pytest.mark.parametrize("peer", PEERS)
async def test_a_peer_keeps_one_heartbeat_a_bucket_and_knows_its_tokens(empty_database: db.Database, peer: str) -> None:
    module, words, prepare, table = PEERS[peer]
    conn = await asyncpg.connect(empty_database.dsn)
    await prepare(conn)
    now = datetime.now(UTC).replace(second=30, microsecond=123_000)
    raw = body(FLEET[0], now, 1)
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
        COMPARE.quicker(),
        devices=50,
        steady=replace(STEADY_2000, devices=50, interval_s=1, jitter_s=0, duration_s=1),
        connections=(4,),
        trial_s=0.4,
        round_s=0.4,
        warm_s=0.1,
        peer_s=0.4,
        peer_connections=(4,),
        pools=(2,),
        hashed_devices=2,
        hashed_connections=1,
        hashed_s=3.0,
        batch_connections=(2,),
        batch_s=0.4,
        copy_rows=(500, 1_000),
        rates=(50, 200),
        rate_s=1.0,
        rate_connections=8,
    )
    outcome = await contest.run(plan)
    assert (outcome.steady.check.ok, outcome.rounds.check.ok) == (True, True)
    assert outcome.rounds.check.lines[0].found > 1_000
    found = outcome.found
    assert found.kept == found.acknowledged > 0
    assert all(each.median > 0 for each in (*found.singles.values(), *found.batches.values()))
    assert set(found.singles) == {f.BARE, f.NEXHB, f.FASTAPI, f.NEXMDM, f.NEXMDM_THREADS, f.NEXMDM_BCRYPT}
    assert found.copy > 1_000
    assert len(f.verdicts(found)) == 11
