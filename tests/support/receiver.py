"""A real HTTP server that receives webhooks, and that can behave badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook

from nexhb.config import RouteSettings
from tests.conftest import SOON_S

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def accept(_request: web.Request) -> web.StreamResponse:
    """Respond with 204."""
    return web.Response(status=204)


@dataclass
class Received:
    """A message that was received, with a valid signature."""

    path: str
    message_id: str
    body: dict[str, Any]

    @property
    def summary(self) -> tuple[str, str]:
        """Return the type, and the text without the name of the site."""
        return self.body["type"], self.body["data"]["text"]


@dataclass
class Receiver:
    """What was received. `respond` decides the response; it may be replaced at any time."""

    url: str = ""
    check: bool = True  # the signature of every message
    respond: Respond = accept
    messages: list[Received] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)  # the ids of all messages, also of those that were not accepted
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Check the signature of a webhook, and record the message if it is accepted."""
        text = (await request.read()).decode()
        is_webhook = self.check and request.method == "POST"
        body = Webhook(SECRET).verify(text, dict(request.headers)) if is_webhook else {}
        message_id = request.headers.get("webhook-id", "")
        self.attempts.append(message_id)
        self._changed.set()
        response = await self.respond(request)
        if response.status < 300:
            self.messages.append(Received(request.path, message_id, body))
            self._changed.set()
        return response

    async def count(self, messages: int) -> list[Received]:
        """Wait until this many messages were received, and return them."""
        await self.until(lambda: len(self.messages) >= messages)
        return self.messages

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Wait until a condition is true, which only a request can make true."""
        async with asyncio.timeout(SOON_S):
            while not is_true():
                self._changed.clear()
                await self._changed.wait()

    def route(self, name: str = "on-call", /, **settings: Any) -> RouteSettings:
        """Return the settings of a route to this receiver."""
        return RouteSettings.model_validate(
            {"name": name, "url": f"{self.url}/{name}", "secret": SECRET, "allow_private": True} | settings
        )


@asynccontextmanager
async def receiving(*, check: bool = True) -> AsyncIterator[Receiver]:
    """Run a receiver for the block. Without `check`, it accepts requests of any kind."""
    receiver = Receiver(check=check)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", receiver.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    receiver.url = f"http://{host}:{port}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
