"""Of one batch a day could not be made just then, and the COMMIT of the rest was not answered. What became of it was
found out, with a verdict for each heartbeat of the rest and none for the others: the writer died of the difference, and
the daemon with it, in the middle of the fleet."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest
from pydantic import SecretStr

from nexhb import partitions
from nexhb.config import Database as DatabaseSettings
from nexhb.db import Connection, Database
from tests.conftest import StartDaemon, example
from tests.proxy import Proxy, Trick


async def test_a_doubt_beside_a_day_that_cannot_be_made_is_answered(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = now - timedelta(days=6)
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
        ensure = partitions.ensure

        async def busy(conn: Connection, days: list[date]) -> Any:
            if missing.date() in days:
                raise asyncpg.LockNotAvailableError
            return await ensure(conn, days)

        monkeypatch.setattr(partitions, "ensure", busy)
        agent = await nexhb.agent()
        proxy.trick = Trick.SWALLOW_ANSWER
        both = orjson.dumps([example(missing), example(now)])
        assert (await agent.post(both, "/v1/heartbeats")).status == 503
        assert proxy.played.is_set()
        assert not nexhb.running.failed.done()
        again = await agent.send(now)
        assert (again.status, again.body["deduplicated"]) == (200, True)
