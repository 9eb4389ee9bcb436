"""A list that was cut asked for its count, and then for its rows. Devices that went between the two were counted and
not listed, those that came were listed and not counted: "count": 3 without a row, "count": 1 with two. Count and rows
are of one moment."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

import pytest

from nexhb.db import Connection, Database
from nexhb.presence import Presence
from nexhb.reads import FromStatus, Offline, UnityDown

NOW = datetime.now(UTC)
LIMIT = 2


class _Restless:
    """A connection, and a fleet of which other devices are listed after each statement."""

    def __init__(self, conn: Connection, other: Connection, revoked: Iterator[list[str]]) -> None:
        self._conn, self._other, self._revoked = conn, other, revoked

    async def fetch(self, *asked: Any) -> Any:
        return await self._changed(await self._conn.fetch(*asked))

    async def fetchval(self, *asked: Any) -> Any:
        return await self._changed(await self._conn.fetchval(*asked))

    async def _changed(self, found: Any) -> Any:
        await _revoke(self._other, next(self._revoked))
        return found


async def _revoke(conn: Connection, device_ids: list[str]) -> None:
    await conn.execute(
        "UPDATE devices SET revoked_at = CASE WHEN device_id = ANY($1::text[]) THEN now() END", device_ids
    )


@pytest.mark.parametrize("question", [Offline(timedelta(minutes=10), LIMIT), UnityDown(timedelta(minutes=10), LIMIT)])
@pytest.mark.parametrize("revoked", [(["a", "b"], []), ([], ["a", "b"]), (["a", "b", "c"], []), ([], ["a", "b", "c"])])
async def test_count_and_rows_agree_whatever_comes_between_two_statements(
    conn: Connection, database: Database, question: Offline | UnityDown, revoked: tuple[list[str], ...]
) -> None:
    await conn.execute(
        """WITH made AS (INSERT INTO devices (device_id) VALUES ('a'), ('b'), ('c') RETURNING device_no, device_id)
        INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, unity_running)
        SELECT device_no, device_id, $1, $1, $1, false FROM made""",
        NOW - timedelta(hours=1),
    )
    async with database.connected(application="test") as other:
        for _ in range(3):
            found = await FromStatus().ask(_Restless(conn, other, cycle(revoked)), question, Presence(NOW, None))  # type: ignore[arg-type]
            assert len(found.rows) == min(found.count, LIMIT)
            await _revoke(other, [])
