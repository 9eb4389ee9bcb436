"""Found by somebody whose task was to break the archive: connections that are lost in the middle of a run."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from nexhb.db import Connection, Database
from nexhb.errors import DatabaseUnavailable
from tests.integration.test_nightly import OLD, House


@pytest.fixture
def house(database: Database, conn: Connection, tmp_path: Path) -> House:
    """A house."""
    return House(database, conn, tmp_path)


async def cut(conn: Connection, after_s: float) -> None:
    """End the run's connection."""
    await asyncio.sleep(after_s)
    await conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb nightly'"
    )


async def test_a_connection_lost_at_any_moment_is_a_failed_run_that_the_next_one_finishes(house: House) -> None:
    """A connection that the server has just ended does not know it yet: `is_closed` says no, each call that it is busy.

    The run went on to its next steps, then its end could not be written down, and neither the failure nor the lock's
    loss was what the caller got, but an InterfaceError out of the lock's release. No day was lost.
    """
    assert (await house.nightly()).status == "completed"
    for n in range(20):
        day = OLD - timedelta(days=n)
        await house.fill(day, devices=20, rows=200)
        before = await house.rows(day)
        cutting = asyncio.create_task(cut(house.conn, 0.004 * n))
        try:
            run = await house.nightly()
            assert run.status == "completed" or run.reason
        except DatabaseUnavailable:
            pass  # lost before it had its lock
        await cutting
        assert not await house.conn.fetchval("SELECT count(*) FROM job_runs WHERE status = 'running'")
        again = await house.nightly()
        assert (again.status, again.reason) == ("completed", "")
        assert (await house.state(day))["state"] == "dropped"
        assert len(await house.archived(day)) == len(before)
