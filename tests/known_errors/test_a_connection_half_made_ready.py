"""The writer's new connection stalled while it was being made ready, and was kept as it was: it took addresses in
another form than it was then given. Every heartbeat with an address, and that is every one, was refused with 422 until
the connection was lost."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import SecretStr

from nexhb import db
from nexhb.config import Database as DatabaseSettings
from nexhb.db import Connection, Database
from tests.conftest import StartDaemon
from tests.proxy import Proxy, Trick


async def test_a_connection_that_was_not_made_ready_is_not_used(
    start_daemon: StartDaemon, database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        nexhb = await start_daemon(database=DatabaseSettings(url=SecretStr(proxy.dsn)))
        agent = await nexhb.agent()
        packed = db.use_packed
        stalled: list[Connection] = []

        async def stalls_once(conn: Connection) -> None:
            if not stalled:
                stalled.append(conn)
                raise TimeoutError
            await packed(conn)

        monkeypatch.setattr(db, "use_packed", stalls_once)
        proxy.trick = Trick.CUT_BEFORE
        while (await agent.send(now)).status != 200:  # 503 where the writer found it stalled with nothing to write
            pass
        assert stalled[0].is_closed()
