"""Each POST /v1/register opened a connection to the database, right key or wrong: 280 at once took every one of the
embedded PostgreSQL's 60, the writer's next one too, and told all of them to come again after exactly 5 s. Four at a
time have their turn now, and 503 spreads."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import SecretStr

from nexhb import devices
from nexhb.config import Auth
from nexhb.db import Connection
from nexhb.http import parts
from tests.conftest import ADMIN_KEY, StartDaemon

ONES_OWN = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb http' AND datname = current_database()"
)


async def test_registrations_take_turns_at_a_few_connections(start_daemon: StartDaemon, conn: Connection) -> None:
    nexhb = await start_daemon(auth=Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open"))
    expires_at = nexhb.clock() + timedelta(hours=1)
    key = await devices.issue_enrolment_key(conn, note=None, uses=100, expires_at=expires_at)
    most = 0

    async def register() -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with nexhb.http.post(f"{nexhb.url}/v1/register", json={}, headers=headers) as response:
            return response.status

    calls = asyncio.gather(*(register() for _ in range(100)))
    while not calls.done():
        most = max(most, await conn.fetchval(ONES_OWN))
    assert await calls == [200] * 100
    assert 1 <= most <= parts.CHANGES_AT_ONCE + 1  # one that closes may still be seen
