"""Lists as CSV: all pages in one response, which holds no connection while the client reads, and is bounded."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import datetime, timedelta

import aiohttp
import pytest

from nexhb.http.operator_api import listing
from nexhb.postgres.connections import Connection
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon
from tests.support.watching import Watched

ADMIN = {"x-admin": ADMIN_KEY}


async def table(nexhb: Nexhb, path: str) -> list[dict[str, str]]:
    """Return the rows of a list as CSV."""
    separator = "&" if "?" in path else "?"
    async with nexhb.http.get(f"{nexhb.url}{path}{separator}format=csv", headers=ADMIN) as response:
        assert (response.status, response.content_type) == (200, "text/csv")
        return list(csv.DictReader(io.StringIO((await response.read()).decode(), newline="")))


@pytest.fixture
async def watched(start_daemon: StartDaemon, conn: Connection, now: datetime) -> Watched:
    """A fleet of seven, of which three are silent and one has the Unity app down."""
    watched = await Watched.start(start_daemon, conn, now)
    await watched.add("a", "b", "c", site="store-42")
    await watched.add("d", "e", "f", "g")
    await watched.minutes(1)
    watched.kiosks["d"].changes = {"unity_process_running": False, "alias": '=HYPERLINK("x")'}
    await watched.minutes(11, silent=["a", "b", "e"])
    return watched


async def test_every_list_is_one_table_with_the_rows_and_fields_of_its_pages(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "CSV_PAGE", 2)
    nexhb = watched.nexhb
    for path, name in (
        ("/v1/devices", "devices"), ("/v1/devices?sort=heard_at", "devices"), ("/v1/devices/offline", "devices"),
        ("/v1/devices/offline?q=e", "devices"), ("/v1/devices/unity-down", "devices"), ("/v1/events", "events"),
        ("/v1/devices/d/heartbeats", "heartbeats"), ("/v1/events?order=asc", "events"),
        ("/v1/incidents?state=all", "incidents"),
    ):  # fmt: skip
        rows, found = (await nexhb.get(path))[name], await table(nexhb, path)
        assert found
        for row, cells in zip(rows, found, strict=True):
            assert cells.keys() == row.keys(), path
            for field in row.keys() & {"device_id", "ts", "event_id", "incident_id", "offline_seconds", "silenced"}:
                assert cells[field] == ("" if row[field] is None else str(row[field]))
    assert [row["alias"] for row in await table(nexhb, "/v1/devices/unity-down")] == ['\'=HYPERLINK("x")']
    assert await table(nexhb, "/v1/devices?site=nowhere") == []
    separate = await table(nexhb, "/v1/devices?limit=3&after=b")
    assert [row["device_id"] for row in separate] == ["c", "d", "e"]


async def test_a_list_that_is_too_long_breaks_off(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "CSV_PAGE", 2)
    for limit, value in (("MAX_ROWS", 4), ("MAX_S", -1.0)):
        with monkeypatch.context() as patched:
            patched.setattr(listing, limit, value)
            with pytest.raises(aiohttp.ClientError):
                await table(watched.nexhb, "/v1/devices")
    assert len(await table(watched.nexhb, "/v1/devices")) == 7


async def test_a_daemon_sends_few_of_them_at_once(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_AT_ONCE", 0)
    assert "as CSV" in (await watched.nexhb.get("/v1/events?format=csv", 429))["detail"]
    monkeypatch.setattr(listing, "MAX_AT_ONCE", 1)
    for _ in range(2):  # each gives its place back, also after an error
        assert (await watched.nexhb.get("/v1/devices?format=csv&after=x&sort=heard_at", 400))["errors"]
    assert len(await table(watched.nexhb, "/v1/devices")) == 7
    assert (await watched.nexhb.get("/v1/events?format=xml", 400))["errors"][0]["path"] == "format"


_BUSY = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nexhb reads' AND state <> 'idle'"


async def test_a_slow_reader_holds_no_connection(watched: Watched) -> None:
    """The list is larger than the buffers of the sockets, so that the daemon waits for the client."""
    await watched.conn.execute(
        """INSERT INTO device_last_status (device_no, device_id, last_ts, received_at, heard_at, alias)
        SELECT 1000 + n, 'k' || n, $1, $1, $1, repeat('x', 200) FROM generate_series(1, 30000) n""",
        watched.now - timedelta(hours=1),
    )
    async with watched.nexhb.http.get(f"{watched.nexhb.url}/v1/devices/offline?format=csv", headers=ADMIN) as response:
        assert (await response.content.readline()).startswith(b"device_id,")
        async with asyncio.timeout(SOON_S):
            while await watched.conn.fetchval(_BUSY):  # until the page is read, and the client has to read on
                await asyncio.sleep(0.02)
        rows = sum([1 async for _ in response.content])
    assert rows == 30_003
