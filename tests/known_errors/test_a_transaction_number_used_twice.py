"""PostgreSQL crashed around a COMMIT, and forgot that transaction's number: it had written nothing of it to disk.
Asked after it, PostgreSQL called it one of the future, and a good heartbeat was refused with 422 (`make faults` found
that); or it had given the number to somebody else, who committed: a heartbeat that was not in was acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime

import pytest

from nexhb.db import Database
from tests.conftest import SOON_S, Nexhb, StartDaemon
from tests.faults.cluster import Cluster, running, until_up
from tests.faults.guard import guarding
from tests.proxy import Proxy, Trick


@pytest.fixture
async def own_cluster() -> AsyncIterator[Cluster]:
    """One that may crash."""
    with guarding() as guard:
        async with running(guard) as cluster:
            yield cluster


async def crash_before_commit(proxy: Proxy, cluster: Cluster) -> None:
    """The COMMIT does not arrive, and PostgreSQL dies before anything of the transaction is on disk."""
    proxy.trick = Trick.CUT_BEFORE
    await proxy.played.wait()
    cluster.kill()
    proxy.take_away()
    async with asyncio.timeout(SOON_S):
        await cluster.started_again(1)
    await until_up(cluster, 10)


@pytest.mark.parametrize("others", [0, 100])
async def test_a_commit_in_doubt_is_told_from_another_with_its_number(
    start_daemon: StartDaemon, own_cluster: Cluster, now: datetime, others: int
) -> None:
    database = Database(own_cluster.dsn)
    async with Proxy(own_cluster.dsn).serving() as proxy:
        nexhb: Nexhb = replace(await start_daemon(url=proxy.dsn), database=database)
        agent = await nexhb.agent()
        crash = asyncio.create_task(crash_before_commit(proxy, own_cluster))
        await asyncio.sleep(0)
        sent = asyncio.create_task(agent.send(now))
        await crash
        for _ in range(others):
            await nexhb.rows("SELECT pg_current_xact_id()")
        proxy.give_back()
        answer = await sent
        while answer.status == 503:  # not in time on a slow machine; then it comes again, and nothing is there twice
            answer = await agent.send(now)
        assert (answer.status, len(await nexhb.rows("SELECT FROM device_heartbeats"))) == (200, 1)
