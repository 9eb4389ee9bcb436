"""Routes with `self = true` are told that nexhb is not ready, without its database and across restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web

from nexhb.config import NotifySettings, RouteSettings, Settings
from nexhb.messages import channels, own_outage
from nexhb.messages.own_outage import TOLD_AFTER, OwnOutage
from nexhb.messages.routes import routes_of
from nexhb.readiness import Readiness, Source
from tests.support.receiver import Receiver, accept, receiving

START = datetime(2026, 6, 1, tzinfo=UTC)


class Clock:
    """A clock that the test moves."""

    now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that accepts every message."""
    async with receiving() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_outage, "CHECK_S", 0.01)
    monkeypatch.setattr(own_outage, "LONGEST_RETRY_S", 0.01)


@asynccontextmanager
async def watching(
    readiness: Readiness, folder: Path, clock: Callable[[], datetime], *routes: RouteSettings
) -> AsyncIterator[None]:
    """Watch the readiness during the block, as a daemon does."""
    settings = Settings(notify=NotifySettings(routes=list(routes)))
    async with channels.opened(routes_of(settings), lambda: datetime.now(UTC)) as opened:
        outage = OwnOutage(readiness, opened, folder, clock)
        task = asyncio.create_task(outage.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_an_outage_of_two_minutes_is_told_and_its_end(receiver: Receiver, tmp_path: Path) -> None:
    readiness, clock = Readiness(), Clock()
    async with watching(readiness, tmp_path, clock, receiver.route(self=True), receiver.route("other")):
        readiness.block(Source.DATABASE, "The database cannot be reached.")
        await asyncio.sleep(0.05)
        clock.now += TOLD_AFTER - timedelta(seconds=1)
        await asyncio.sleep(0.05)
        assert receiver.attempts == []
        clock.now += timedelta(seconds=1)
        await receiver.count(1)
        await asyncio.sleep(0.05)
        readiness.clear(Source.DATABASE)
        first, last = await receiver.count(2)
    assert (first.path, first.body["type"], last.body["type"]) == ("/on-call", "nexhb.not_ready", "nexhb.ready")
    assert first.body["data"]["detail"] == "The database cannot be reached."
    assert first.body["data"]["since"] == "2026-06-01T00:00:00Z"
    assert len(receiver.attempts) == 2
    assert not (tmp_path / own_outage.FILE).exists()


async def test_a_short_outage_is_not_told(receiver: Receiver, tmp_path: Path) -> None:
    readiness, clock = Readiness(), Clock()
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        for _ in range(3):
            readiness.block(Source.DATABASE, "The database cannot be reached.")
            await asyncio.sleep(0.03)
            clock.now += TOLD_AFTER - timedelta(seconds=1)
            await asyncio.sleep(0.03)
            readiness.clear(Source.DATABASE)
            await asyncio.sleep(0.03)
    assert receiver.attempts == []


async def test_after_a_restart_the_same_outage_has_the_same_id_and_its_end_is_told(
    receiver: Receiver, tmp_path: Path
) -> None:
    readiness, clock = Readiness(), Clock()
    readiness.block(Source.DATABASE, "The database cannot be reached.")
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        await asyncio.sleep(0.03)
        clock.now += TOLD_AFTER
        await receiver.count(1)
        await asyncio.sleep(0.05)
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        clock.now += TOLD_AFTER
        await asyncio.sleep(0.05)  # the route knows it already
        assert len(receiver.attempts) == 1
    async with watching(readiness, tmp_path, clock, receiver.route(self=True), receiver.route("second", self=True)):
        _, second = await receiver.count(2)  # a route that was added meanwhile
        assert second.path == "/second"
    async with watching(Readiness(), tmp_path, clock, receiver.route(self=True), receiver.route("second", self=True)):
        messages = await receiver.count(4)
    assert sorted(m.path for m in messages[2:]) == ["/on-call", "/second"]
    assert {m.body["type"] for m in messages[2:]} == {"nexhb.ready"}
    assert {m.body["data"]["since"] for m in messages} == {"2026-06-01T00:00:00Z"}


async def test_a_receiver_that_fails_gets_the_same_id_again_and_nothing_once_the_outage_is_over(
    receiver: Receiver, tmp_path: Path
) -> None:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    readiness, clock = Readiness(), Clock()
    receiver.respond = refuse
    readiness.block(Source.DATABASE, "The database cannot be reached.")
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        await asyncio.sleep(0.03)
        clock.now += TOLD_AFTER
        await receiver.until(lambda: len(receiver.attempts) >= 3)
        readiness.clear(Source.DATABASE)
        await asyncio.sleep(0.1)
        receiver.respond = accept
        await asyncio.sleep(0.1)
    assert len(set(receiver.attempts)) == 1
    assert receiver.messages == []


async def test_a_daemon_that_is_killed_before_the_response_tells_the_end_after_its_restart(
    receiver: Receiver, tmp_path: Path
) -> None:
    """A daemon was killed right after a route had received its message: it had not kept yet that the route was told,
    and so the route never received the end."""
    arrived = asyncio.Event()

    async def hang(_request: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    readiness, clock = Readiness(), Clock()
    receiver.respond = hang
    readiness.block(Source.DATABASE, "The database cannot be reached.")
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        await asyncio.sleep(0.03)
        clock.now += TOLD_AFTER
        await arrived.wait()
    receiver.respond = accept
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        again = (await receiver.count(1))[0]  # still not ready
    async with watching(Readiness(), tmp_path, clock, receiver.route(self=True)):
        last = (await receiver.count(2))[1]
    assert again.message_id == receiver.attempts[0]
    assert (again.body["type"], last.body["type"]) == ("nexhb.not_ready", "nexhb.ready")
    assert again.body["data"]["since"] == last.body["data"]["since"] == "2026-06-01T00:00:00Z"


async def test_an_outage_that_ends_while_its_message_is_sent_is_told_with_its_end(
    receiver: Receiver, tmp_path: Path
) -> None:
    arrived, may_respond = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        arrived.set()
        await may_respond.wait()
        return await accept(request)

    readiness, clock = Readiness(), Clock()
    receiver.respond = wait
    readiness.block(Source.DATABASE, "The database cannot be reached.")
    async with watching(readiness, tmp_path, clock, receiver.route(self=True)):
        await asyncio.sleep(0.03)
        clock.now += TOLD_AFTER
        await arrived.wait()
        readiness.clear(Source.DATABASE)
        await asyncio.sleep(0.05)
        may_respond.set()
        first, last = await receiver.count(2)
    assert (first.body["type"], last.body["type"]) == ("nexhb.not_ready", "nexhb.ready")
    assert last.body["data"]["since"] == "2026-06-01T00:00:00Z"
