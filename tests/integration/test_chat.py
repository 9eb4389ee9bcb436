"""Messages by Apprise, to a real service that speaks its own JSON."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web

from nexhb.errors import DeliveryFailed
from nexhb.messages import chat
from nexhb.messages.chat import Chats
from nexhb.messages.message import OPENED, Message
from tests.support.receiver import receiving

MESSAGE = Message(
    "msg_1", OPENED, datetime(2026, 6, 1, tzinfo=UTC),
    {"kind": "offline", "scope": "device", "device_id": "k1", "device_name": "@everyone http://evil.example",
     "severity": "warning"},
)  # fmt: skip


async def test_a_service_receives_title_text_and_id_without_mentions() -> None:
    bodies: list[dict[str, Any]] = []

    async def respond(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.Response(status=200)

    async with receiving(check=False) as receiver:
        receiver.respond = respond
        await Chats().send("chat", receiver.url.replace("http", "json"), MESSAGE)
    (body,) = bodies
    assert body["title"] == "\uff20everyone http\uff1a//evil\uff0eexample is offline"
    assert body["message"] == "severity: warning\ndevice: k1\nmsg_1"
    assert body["type"] == "warning"


async def test_a_service_that_refuses_is_a_failure_with_apprises_reason_and_no_line_in_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def respond(_request: web.Request) -> web.Response:
        return web.Response(status=403)

    async with receiving(check=False) as receiver:
        receiver.respond = respond
        with pytest.raises(DeliveryFailed, match="403"):
            await Chats().send("chat", receiver.url.replace("http", "json") + "/geheim", MESSAGE)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


async def test_threads_of_a_service_that_hangs_are_limited_and_other_routes_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = asyncio.Event()

    async def respond(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await go_on.wait()
        return web.Response(status=200)

    monkeypatch.setattr(chat, "MAX_THREADS", 2)
    chats = Chats()
    async with receiving(check=False) as receiver:
        receiver.respond = respond
        url = receiver.url.replace("http", "json")
        tasks = [asyncio.create_task(chats.send("slow", url + "/slow", MESSAGE)) for _ in range(2)]
        await receiver.until(lambda: len(receiver.attempts) == 2)
        with pytest.raises(DeliveryFailed, match="still wait"):
            await chats.send("slow", url + "/slow", MESSAGE)
        await chats.send("fast", url + "/fast", MESSAGE)
        go_on.set()
        await asyncio.gather(*tasks)
        await chats.send("slow", url + "/slow", MESSAGE)
