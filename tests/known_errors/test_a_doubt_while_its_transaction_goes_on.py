"""A COMMIT was not answered, and on the next connection its transaction was still in progress: the doubt was raised
again before the line that binds `impossible`, and the device heard 503 "internal error" in place of the retry's 200."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from nexhb import writer as writer_module
from nexhb.db import Database
from tests.conftest import SOON_S, StartDaemon
from tests.proxy import Proxy, Trick

# The answer while the backend has not noticed yet that its client is gone.
IN_PROGRESS = "SELECT 'in progress' WHERE $1::text IS NOT NULL"


@pytest.mark.parametrize("trick", [Trick.SWALLOW_ANSWER, Trick.CUT_BEFORE])
async def test_a_transaction_that_is_still_in_progress_is_asked_after_again(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch, trick: Trick
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(url=proxy.dsn)
        agent = await nexhb.agent()
        name = 'nexhb_commits_in_doubt_total{outcome="in progress"}'
        before = await nexhb.metric(name)
        right = writer_module._Q
        monkeypatch.setattr(writer_module, "_Q", {**right, "xact_status": IN_PROGRESS})
        proxy.trick = trick
        sent = asyncio.create_task(agent.send(now))
        async with asyncio.timeout(SOON_S):
            while await nexhb.metric(name) < before + 2:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(writer_module, "_Q", right)
        answer = await sent
        assert (answer.status, answer.body["deduplicated"]) == (200, False)
        assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 1
