"""Formerly, each POST /v1/register opened a database connection, with a valid key or a wrong one: 280 requests at once
used all 60 connections of the embedded PostgreSQL, including the one that the writer needed next, and every client
received the same Retry-After of 5 s. Now at most four connections are open at a time, and Retry-After is spread."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import SecretStr

from nexhb.config import AuthSettings
from nexhb.devices import enrolment
from nexhb.http import changes
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, StartDaemon

ONES_OWN = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb http' AND datname = current_database()"
)


async def test_registrations_share_a_few_connections(start_daemon: StartDaemon, conn: Connection) -> None:
    nexhb = await start_daemon(auth=AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))
    expires_at = nexhb.clock() + timedelta(hours=1)
    key = await enrolment.issue_enrolment_key(conn, note=None, uses=100, expires_at=expires_at)
    max_seen = 0

    async def register() -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with nexhb.http.post(f"{nexhb.url}/v1/register", json={}, headers=headers) as response:
            return response.status

    calls = asyncio.gather(*(register() for _ in range(100)))
    while not calls.done():
        max_seen = max(max_seen, await conn.fetchval(ONES_OWN))
    assert await calls == [200] * 100
    assert 1 <= max_seen <= changes.MAX_CHANGES + 1  # a closing connection may still be visible
