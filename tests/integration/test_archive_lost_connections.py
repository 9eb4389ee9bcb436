"""Errors after the loss of a connection during a run, found by trying to break the archive."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from nexhb.errors import DatabaseUnavailable
from nexhb.postgres.connections import Connection
from tests.support.nightly import OLD, House


async def cut(conn: Connection, after_s: float) -> None:
    """Terminate the run's connection."""
    await asyncio.sleep(after_s)
    await conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb nightly'"
    )


async def test_a_connection_lost_at_any_moment_is_a_failed_run_that_the_next_one_finishes(house: House) -> None:
    """A connection that the server has just ended does not report that yet: `is_closed` is false, and calls fail as if
    the connection were busy.

    Formerly, the run continued with its next steps, and then its end could not be recorded. The caller got neither the
    failure nor the loss of the lock, but an InterfaceError from releasing the lock. No day was lost.
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
            pass  # the connection was lost before it had the lock
        await cutting
        assert not await house.conn.fetchval("SELECT count(*) FROM job_runs WHERE status = 'running'")
        again = await house.nightly()
        assert (again.status, again.reason) == ("completed", "")
        assert (await house.state(day))["state"] == "dropped"
        assert len(await house.archived(day)) == len(before)
