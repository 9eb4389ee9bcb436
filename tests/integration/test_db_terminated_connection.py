"""Formerly, if a task that detected another database terminated the listener's connection while a statement was between
two of its steps, asyncpg raised an AttributeError, which no handler of database errors expects, and the daemon
ended."""

from __future__ import annotations

import asyncpg
import pytest

from nexhb.postgres.connections import Database
from nexhb.postgres.errors import Kind, classify


async def test_a_statement_on_a_terminated_connection_raises_the_error_of_a_lost_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await database.pool(application="test", size=1, timeout_s=5)
    async with database.connected(application="test") as own, pool.acquire() as pooled:
        introspect = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]

        async def terminated_before(conn: asyncpg.Connection, *args: object) -> object:
            conn.terminate()
            return await introspect(conn, *args)

        monkeypatch.setattr(asyncpg.Connection, "_introspect_types", terminated_before)
        for conn in (own, pooled):
            with pytest.raises(asyncpg.InterfaceError) as caught:
                await conn.fetch("SELECT NULL::job_runs")  # a type that asyncpg has not looked up yet
            assert classify(caught.value) is Kind.LOST
    pool.terminate()
