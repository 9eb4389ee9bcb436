"""Webhooks: what is sent, and what a receiver that behaves badly can do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from aiohttp import web

from nexhb.errors import DeliveryFailed
from nexhb.messages import webhooks
from nexhb.messages.message import OPENED, Message
from nexhb.messages.webhooks import Webhooks, is_public
from tests.support.receiver import SECRET, Receiver, receiving

MESSAGE = Message(
    "msg_1", OPENED, datetime(2026, 6, 1, tzinfo=UTC),
    {"incident_id": 7, "kind": "offline", "scope": "device", "device_id": "kiosk-1", "site": None},
)  # fmt: skip


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that accepts every message."""
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def client() -> AsyncIterator[Webhooks]:
    """The client for webhooks."""
    client = Webhooks(lambda: datetime.now(UTC))
    yield client
    await client.close()


async def test_a_message_is_json_with_an_id_a_time_and_a_signature(receiver: Receiver, client: Webhooks) -> None:
    await client.send(receiver.url + "/hook", SECRET, MESSAGE, allow_private=True)
    (message,) = receiver.messages  # the receiver has checked the signature
    assert (message.path, message.message_id) == ("/hook", "msg_1")
    assert message.body["type"] == "incident.opened"
    assert message.body["timestamp"] == "2026-06-01T00:00:00Z"
    assert message.body["data"]["incident_id"] == 7
    assert message.body["data"]["text"] == "kiosk-1 is offline"


@pytest.mark.parametrize("status", [302, 400, 404, 500])
async def test_only_2xx_counts_and_a_redirect_is_not_followed(
    receiver: Receiver, client: Webhooks, status: int
) -> None:
    async def respond(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": receiver.url + "/elsewhere"})

    receiver.respond = respond
    with pytest.raises(DeliveryFailed, match=f"The response is {status}"):
        await client.send(receiver.url + "/hook", SECRET, MESSAGE, allow_private=True)
    assert receiver.attempts == ["msg_1"]


async def test_a_receiver_that_hangs_is_given_up(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    receiver.respond = hang
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.2)
    client = Webhooks(lambda: datetime.now(UTC))
    try:
        with pytest.raises(DeliveryFailed, match=r"no response within 0\.2 s"):
            await client.send(receiver.url, SECRET, MESSAGE, allow_private=True)
    finally:
        await client.close()


async def test_of_a_response_of_two_gigabytes_little_is_read(receiver: Receiver, client: Webhooks) -> None:
    sent = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Length": str(2 << 30)})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65_536)
                sent += 65_536
        except (ConnectionError, RuntimeError):
            closed.set()
        return response

    closed = asyncio.Event()
    receiver.respond = flood
    await client.send(receiver.url, SECRET, MESSAGE, allow_private=True)
    await asyncio.wait_for(closed.wait(), 30)
    assert sent < 20 << 20  # the sockets' buffers


async def test_a_private_address_is_refused_also_behind_a_name_and_nothing_is_sent(
    receiver: Receiver, client: Webhooks
) -> None:
    port = receiver.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0"):
        with pytest.raises(DeliveryFailed) as caught:
            await client.send(f"http://{host}:{port}/secret-path", SECRET, MESSAGE, allow_private=False)
        assert "secret-path" not in str(caught.value)
        if host in ("127.0.0.1", "localhost"):
            assert "allow_private" in str(caught.value)
    assert receiver.attempts == []


async def test_a_name_that_is_rebound_to_a_private_address_is_refused(
    receiver: Receiver, client: Webhooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is checked where the connection is made, not where the name was looked up before."""
    real = socket.getaddrinfo

    def rebound(host: object, *args: object, **kwargs: object) -> object:
        return real("127.0.0.1" if host == "hooks.example" else host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    loop = asyncio.get_running_loop()

    async def resolve(host: object, *args: object, **kwargs: object) -> object:
        return rebound(host, *args, **kwargs)

    monkeypatch.setattr(type(loop), "getaddrinfo", lambda _, *args, **kwargs: resolve(*args, **kwargs), raising=False)
    port = receiver.url.rpartition(":")[2]
    with pytest.raises(DeliveryFailed, match="allow_private"):
        await client.send(f"http://hooks.example:{port}/", SECRET, MESSAGE, allow_private=False)
    assert receiver.attempts == []


async def test_nobody_listening_is_a_failure_without_the_path_of_the_url(client: Webhooks) -> None:
    with pytest.raises(DeliveryFailed, match="connection failed") as caught:
        await client.send("http://127.0.0.1:9/secret-path", SECRET, MESSAGE, allow_private=True)
    assert "secret-path" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("10.0.0.1", False), ("172.20.0.1", False),
        ("192.168.1.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("224.0.0.1", False), ("0.1.2.3", False),
        ("255.255.255.255", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True),
        ("2002:a00:1::", False), ("240.0.0.1", False), ("198.18.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
