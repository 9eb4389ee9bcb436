"""A listener's connection was terminated by who found another database, while a statement was between two of its steps:
AttributeError, which nobody expects of a database, ended the daemon."""

from __future__ import annotations

import asyncpg
import pytest

from nexhb.db import Database
from nexhb.pgerrors import Kind, classify


async def test_a_statement_of_a_terminated_connection_fails_as_of_a_lost_one(
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
                await conn.fetch("SELECT NULL::job_runs")  # a type of which nothing is known yet
            assert classify(caught.value) is Kind.LOST
    pool.terminate()
