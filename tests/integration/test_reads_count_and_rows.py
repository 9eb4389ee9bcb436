"""Formerly, for a list that was cut off at its limit, nexhb read the count first and then the rows. A device that left
the list between the two statements was counted but not listed, one that joined was listed but not counted: "count": 3
without a row, "count": 1 with two. Now count and rows come from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle
from typing import Any

import pytest

from nexhb.devices.presence import Presence
from nexhb.postgres.connections import Connection, Database
from nexhb.reading.last_status import LastStatusReader
from nexhb.reading.queries import OfflineQuery, UnityDownQuery
from tests.support.clock import START

NOW = START
LIMIT = 2


class _ChangingFleet:
    """A connection to a fleet whose listed devices change after each statement."""

    def __init__(self, conn: Connection, other: Connection, revoked: Iterator[list[str]]) -> None:
        self._conn, self._other, self._revoked = conn, other, revoked

    async def fetch(self, *args: Any) -> Any:
        return await self._changed(await self._conn.fetch(*args))

    async def fetchval(self, *args: Any) -> Any:
        return await self._changed(await self._conn.fetchval(*args))

    async def _changed(self, result: Any) -> Any:
        await _revoke(self._other, next(self._revoked))
        return result


async def _revoke(conn: Connection, device_ids: list[str]) -> None:
    await conn.execute(
        "UPDATE devices SET revoked_at = CASE WHEN device_id = ANY($1::text[]) THEN now() END", device_ids
    )


@pytest.mark.parametrize(
    "query", [OfflineQuery(timedelta(minutes=10), LIMIT), UnityDownQuery(timedelta(minutes=10), LIMIT)]
)
@pytest.mark.parametrize("revoked", [(["a", "b"], []), ([], ["a", "b"]), (["a", "b", "c"], []), ([], ["a", "b", "c"])])
async def test_count_and_rows_agree_whatever_changes_between_two_statements(
    conn: Connection, database: Database, query: OfflineQuery | UnityDownQuery, revoked: tuple[list[str], ...]
) -> None:
    await conn.execute(
        """WITH made AS (INSERT INTO devices (device_id) VALUES ('a'), ('b'), ('c') RETURNING device_no, device_id)
        INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, unity_running)
        SELECT device_no, device_id, $1, $1, $1, false FROM made""",
        NOW - timedelta(hours=1),
    )
    async with database.connected(application="test") as other:
        for _ in range(3):
            changing: Any = _ChangingFleet(conn, other, cycle(revoked))
            result = await LastStatusReader().run(changing, query, Presence(NOW, None))
            assert len(result.rows) == min(result.count, LIMIT)
            await _revoke(other, [])
