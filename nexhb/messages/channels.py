"""Send a message on the channel of its route: a webhook, or Apprise."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from nexhb import metrics
from nexhb.errors import DeliveryFailed
from nexhb.messages.chat import Chats
from nexhb.messages.message import TEST, Message
from nexhb.messages.routes import Route
from nexhb.messages.webhooks import Webhooks

TIMEOUT_S = 30.0  # of a delivery, whatever the channel


class Channels:
    """The routes of a daemon, and the channels of their messages."""

    def __init__(self, routes: Sequence[Route], webhooks: Webhooks) -> None:
        self.routes = {route.name: route for route in routes}
        self.webhooks = webhooks
        for name in self.routes:
            for result in ("delivered", "failed", "given_up"):
                metrics.notifications.labels(route=name, result=result)  # from the start, so that rates are right
        self._chats = Chats()

    async def send(self, route: Route, message: Message) -> None:
        """Send a message, and count it. Raise DeliveryFailed."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._send(route, message)
        except TimeoutError:
            metrics.notifications.labels(route=route.name, result="failed").inc()
            raise DeliveryFailed(f"There was no response within {TIMEOUT_S:g} s.") from None
        except DeliveryFailed:
            metrics.notifications.labels(route=route.name, result="failed").inc()
            raise
        metrics.notifications.labels(route=route.name, result="delivered").inc()

    async def _send(self, route: Route, message: Message) -> None:
        if route.secret is None:
            await self._chats.send(route.name, route.url, message)
        else:
            await self.webhooks.send(route.url, route.secret, message, allow_private=route.allow_private)


def message_for_test(now: datetime) -> Message:
    """Return a message that tests a route."""
    return Message(f"msg_{uuid.uuid4().hex}", TEST, now, {"severity": "info"})


@asynccontextmanager
async def opened(routes: Sequence[Route], now: Callable[[], datetime]) -> AsyncIterator[Channels]:
    """Open the channels for the block."""
    webhooks = Webhooks(now)
    try:
        yield Channels(routes, webhooks)
    finally:
        await webhooks.close()
