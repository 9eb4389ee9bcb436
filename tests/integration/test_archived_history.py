"""A device's history says which days are archived, and reads them from the archive."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from nexhb.http.operator_api import archived
from nexhb.postgres.connections import Connection
from tests.conftest import Agent, Nexhb, shown
from tests.support.nightly import gone, run_nightly

DAY = timedelta(days=1)


@pytest.fixture
async def agent(nexhb: Nexhb, conn: Connection, now: datetime) -> Agent:
    """A device with heartbeats on four days, of which the two in the middle are archived, and another device."""
    agent, other = await nexhb.agent("kiosk-1"), await nexhb.agent("kiosk-2")
    for days in range(4):
        for minutes in range(3):
            assert (await agent.send(now - days * DAY - minutes * timedelta(minutes=1))).status == 200
        assert (await other.send(now - days * DAY)).status == 200
    for days in (1, 2):
        await gone(nexhb, conn, now - days * DAY)
    assert (await run_nightly(nexhb))["archived"] == 2
    return agent


def times(now: datetime, *days: int) -> list[str]:
    """Return when the device sent on these days, newest first."""
    return [shown(now - day * DAY - minute * timedelta(minutes=1)) for day in days for minute in range(3)]


def path(now: datetime, more: str = "") -> str:
    return f"/v1/devices/kiosk-1/heartbeats?from={shown(now - 5 * DAY)}&limit=100{more}"


async def test_archived_days_are_named_and_read_with_the_same_fields(agent: Agent, now: datetime) -> None:
    nexhb = agent.nexhb
    found = await nexhb.get(path(now))
    assert found["archived_days"] == [f"{now - days * DAY:%Y-%m-%d}" for days in (2, 1)]
    assert [row["ts"] for row in found["heartbeats"]] == times(now, 0, 3)
    whole = await nexhb.get(path(now, "&archived=true"))
    assert ([row["ts"] for row in whole["heartbeats"]], whole["next"]) == (times(now, 0, 1, 2, 3), None)
    live, from_archive = whole["heartbeats"][0], whole["heartbeats"][3]
    times_of = {"ts", "received_at"}
    assert list(live) == list(from_archive)
    assert {name: live[name] for name in live.keys() - times_of} == {
        name: from_archive[name] for name in live.keys() - times_of
    }
    assert (await nexhb.get("/v1/devices/kiosk-1/heartbeats"))["archived_days"] == [f"{now - DAY:%Y-%m-%d}"]


async def test_they_are_read_page_by_page_and_within_the_time_that_was_asked_for(agent: Agent, now: datetime) -> None:
    nexhb = agent.nexhb
    for size in (1, 2, 4):
        seen, after = [], ""
        while True:
            page = await nexhb.get(path(now, f"&archived=true{after}").replace("limit=100", f"limit={size}"))
            seen += [row["ts"] for row in page["heartbeats"]]
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert seen == times(now, 0, 1, 2, 3)
    start, end = now - 2 * DAY - timedelta(minutes=1), now - DAY
    part = await nexhb.get(f"/v1/devices/kiosk-1/heartbeats?archived&from={shown(start)}&to={shown(end)}")
    assert [row["ts"] for row in part["heartbeats"]] == [*times(now, 1)[1:], *times(now, 2)[:2]]


async def test_no_archive_is_read_if_the_first_rows_are_in_the_database(
    agent: Agent, now: datetime, tmp_path: Path
) -> None:
    (tmp_path / "archive").rename(tmp_path / "away")
    page = await agent.nexhb.get(path(now, "&archived=true").replace("limit=100", "limit=2"))
    assert [row["ts"] for row in page["heartbeats"]] == times(now, 0)[:2]


async def test_a_store_that_is_away_or_damaged_is_named(agent: Agent, now: datetime, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.rename(tmp_path / "away")
    assert "archive store" in (await agent.nexhb.get(path(now, "&archived=true"), 503))["detail"]
    (tmp_path / "away").rename(archive)
    for part in archive.rglob("*.zst"):
        part.chmod(0o600)
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert "does not match" in (await agent.nexhb.get(path(now, "&archived=true"), 503))["detail"]


async def test_reading_the_archive_is_bounded(agent: Agent, now: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    nexhb = agent.nexhb
    with monkeypatch.context() as patched:
        patched.setattr(archived, "MAX_DAYS", 1)
        problem = await nexhb.get(path(now, "&archived=true"), 400)
        assert (problem["errors"][0]["path"], "2 days" in problem["errors"][0]["message"]) == ("from", True)
        assert (await nexhb.get(path(now)))["archived_days"]
    with monkeypatch.context() as patched:
        patched.setattr(archived, "MAX_S", 0.0)
        assert "more than 0 s" in (await nexhb.get(path(now, "&archived=true"), 503))["detail"]
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.Semaphore, "locked", lambda _: True)
        assert "from the archive already" in (await nexhb.get(path(now, "&archived=true"), 429))["detail"]
    assert (await nexhb.get(path(now, "&archived=perhaps"), 400))["errors"][0]["path"] == "archived"
    assert (await nexhb.get(f"/v1/devices/{quote('no one')}/heartbeats?archived=true", 404))["status"] == 404
