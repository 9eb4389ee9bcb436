"""GET /v1/stream sends the events of every daemon at once, and is bounded."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

import aiohttp
import pytest

from nexhb import daemon
from nexhb.config import WatchSettings
from nexhb.http.operator_api import stream
from nexhb.postgres.connections import Connection
from nexhb.reading import following
from tests.conftest import ADMIN_KEY, SOON_S, Nexhb, StartDaemon
from tests.support.watching import Watched

ADMIN = {"x-admin": ADMIN_KEY}


@pytest.fixture
async def watched(start_daemon: StartDaemon, conn: Connection, now: datetime) -> Watched:
    """A daemon whose rounds the test runs, and two kiosks, of which one is silent."""
    watched = await Watched.start(start_daemon, conn, now)
    await watched.add("a", "b", "c")
    await watched.minutes(1)
    await watched.minutes(11, silent=["a"])
    return watched


async def opened(stack: AsyncExitStack, nexhb: Nexhb, query: str = "", **headers: str) -> aiohttp.ClientResponse:
    """Open a stream, and read its first line."""
    url = f"{nexhb.url}/v1/stream{query}"
    response = await stack.enter_async_context(nexhb.http.get(url, headers=ADMIN | headers))
    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert await response.content.readuntil(b"\n\n") == b": connected\n\n"
    return response


async def message(response: aiohttp.ClientResponse) -> tuple[str, str, dict[str, Any]]:
    """Return the id, the type and the data of the next message; comments are skipped."""
    async with asyncio.timeout(SOON_S):
        while (text := await response.content.readuntil(b"\n\n")).startswith(b":"):
            pass
        lines = text.decode().removesuffix("\n\n").split("\n")
    number, kind, data = (line.partition(": ")[2] for line in lines)
    return number, kind, json.loads(data)


async def received(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the next event."""
    while True:
        number, kind, event = await message(response)
        if kind == "event":
            assert number == str(event["event_id"])
            return event


async def changes(response: aiohttp.ClientResponse, count: int) -> list[tuple[str, str, str, str]]:
    """Return what the next messages about incidents tell, and their ids."""
    found: list[tuple[str, str, str, str]] = []
    while len(found) < count:
        number, kind, incident = await message(response)
        if kind == "incident":
            found.append((number, incident["change"], incident["scope"], " ".join(incident["named"])))
    return found


async def test_events_of_any_daemon_are_sent_by_notification_and_a_stream_resumes(
    watched: Watched, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "POLL_S", 3600.0)  # only the notification is left
    other = await start_daemon(watch=WatchSettings(interval_seconds=60), now=watched.now)
    async with AsyncExitStack() as stack:
        streams = [await opened(stack, nexhb) for nexhb in (watched.nexhb, other)]
        of_b = await opened(stack, other, "?device=b&kind=offline")
        await watched.minutes(1)
        found = [await received(each) for each in streams]
        assert found[0] == found[1] == (await watched.nexhb.get("/v1/events?limit=1"))["events"][0]
        assert (found[0]["device_id"], found[0]["kind"]) == ("a", "online")
        resumed = await opened(stack, other, **{"Last-Event-ID": "0"})
        assert [(await received(resumed))["kind"] for _ in range(2)] == ["offline", "online"]
        await watched.minutes(11, silent=["b"])
        assert (await received(of_b))["device_id"] == "b"


async def test_incidents_are_sent_when_they_are_opened_widened_and_resolved_and_a_stream_resumes_after_any_message(
    watched: Watched, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "POLL_S", 3600.0)  # only the notification is left
    other = await start_daemon(watch=WatchSettings(interval_seconds=60), now=watched.now)
    await watched.add("s1", "s2", "s3", site="store-42")
    await watched.minutes(1, silent=["a"])
    async with AsyncExitStack() as stack:
        live = await opened(stack, other)
        of_site = await opened(stack, other, "?site=store-42")
        await watched.minutes(1, silent=["a"])
        await watched.minutes(11, silent=["a", "s1"])
        await watched.minutes(4, silent=["a", "s1", "s2"])
        await watched.minutes(11, silent=["s1", "s2"])
        found = await changes(live, 3)
        assert [each[1:] for each in found] == [
            ("opened", "device", "s1"), ("resolved", "device", "a"), ("widened", "site", "s1 s2"),
        ]  # fmt: skip
        assert [each[1:] for each in await changes(of_site, 2)] == [found[0][1:], found[2][1:]]
        await watched.minutes(1)
        [last] = await changes(live, 1)
        assert last[1:] == ("resolved", "site", "s1 s2")
        for place, each in enumerate(found):
            resumed = await opened(stack, watched.nexhb, **{"Last-Event-ID": each[0]})
            [following_change] = await changes(resumed, 1)
            # Of an incident that has changed since, only the last change is sent.
            expected = found[1] if place == 0 else last
            assert following_change[1:] == expected[1:]
            assert following_change[0].partition("-")[2] == expected[0].partition("-")[2]
        newest = (await watched.nexhb.get("/v1/events?limit=1"))["events"][0]["event_id"]
        resumed = await opened(stack, watched.nexhb, **{"Last-Event-ID": str(newest)})
        assert (await changes(resumed, 1))[0] == last, "the incidents of the last event's round follow it"
        data = (await watched.nexhb.get("/v1/incidents?state=all&limit=1"))["incidents"][0]
        resumed = await opened(stack, watched.nexhb, **{"Last-Event-ID": found[2][0]})
        while (found_message := await message(resumed))[1] != "incident":
            pass
        assert found_message[2].keys() - data.keys() == {"change", "absorbed_into"}


async def test_a_lost_notification_delays_an_event_by_a_second_at_most(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "CHANNEL", "nobody_notifies_this")
    async with AsyncExitStack() as stack:
        response = await opened(stack, watched.nexhb)
        await watched.minutes(1)
        assert (await received(response))["kind"] == "online"


async def test_a_comment_keeps_an_idle_stream_alive(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "COMMENT_S", 0.05)
    monkeypatch.setattr(stream, "CHECK_S", 0.05)
    async with AsyncExitStack() as stack:
        response = await opened(stack, watched.nexhb)
        assert await response.content.readuntil(b"\n\n") == b":\n\n"


async def test_streams_are_limited_by_key_and_by_daemon(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(stream.MAX_STREAMS_PER_KEY):
            await opened(stack, watched.nexhb)
        assert "This key" in (await watched.nexhb.get("/v1/stream", 429))["detail"]
        monkeypatch.setattr(stream, "MAX_STREAMS", 5)
        assert "This daemon" in (await watched.nexhb.get("/v1/stream", 429))["detail"]
    async with asyncio.timeout(SOON_S), AsyncExitStack() as stack:
        while True:  # until the daemon has noticed that the clients are gone
            async with watched.nexhb.http.get(f"{watched.nexhb.url}/v1/stream", headers=ADMIN) as response:
                if response.status == 200:
                    break


async def test_a_bad_last_event_id_an_unknown_device_and_a_missing_key_have_their_own_responses(
    watched: Watched,
) -> None:
    nexhb = watched.nexhb
    async with nexhb.http.get(f"{nexhb.url}/v1/stream", headers=ADMIN | {"Last-Event-ID": "x"}) as response:
        assert (response.status, (await response.json())["errors"][0]["path"]) == (400, "Last-Event-ID")
    assert (await nexhb.get("/v1/stream?device=nobody", 404))["status"] == 404
    assert (await nexhb.get("/v1/stream?kind=nothing", 400))["errors"][0]["path"] == "kind"
    async with nexhb.http.get(f"{nexhb.url}/v1/stream?key={ADMIN_KEY}") as response:
        assert response.status == 401


async def test_a_stop_of_the_daemon_does_not_wait_for_streams(watched: Watched) -> None:
    """aiohttp waits for running handlers, up to server.shutdown_timeout_seconds."""
    server = watched.nexhb.settings.server.model_copy(update={"shutdown_timeout_seconds": 60})
    settings = watched.nexhb.settings.model_copy(update={"server": server})
    async with AsyncExitStack() as stack:
        async with daemon.running(settings, watched.nexhb.clock) as running:
            other = replace(watched.nexhb, url=running.url)
            response = await opened(stack, other)
            stopping = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - stopping < SOON_S
        assert await response.content.read() == b""
