"""The receiver of a run: a web server on one port that can be killed, that can hang, and that can fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from bench.process import HOST, free_port
from tests.support.receiver import SECRET

LATENCY_S = (0.02, 0.3)  # so that a kill finds requests in flight
HEALTHY, HANGS, FAILS, DEAF = "healthy", "hangs", "fails", "deaf"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that the receiver has processed, whether or not the sender heard of it."""

    route: str
    message_id: str
    type: str
    data: dict[str, Any]


class Receiver:
    """Records what arrives. It keeps its records when it is killed."""

    def __init__(self, seed: int) -> None:
        self.port = free_port()
        self.arrivals: list[Arrival] = []
        self.forged = 0  # requests with a wrong signature
        self.in_flight = 0
        self.mode = HEALTHY
        self._rng = random.Random(f"nexhb receiver:{seed}")  # noqa: S311 - a simulation
        self._recovered = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Return the address to which the name of a route is appended."""
        return f"http://{HOST}:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port each time."""
        app = web.Application()
        app.router.add_post("/{route}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port).start()

    async def kill(self) -> None:
        """Close the port and every connection; requests in flight are not processed any more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def misbehave(self, mode: str) -> None:
        """Hang, fail, or process messages without a response, until `recover` is called."""
        self._recovered = asyncio.Event()
        self.mode = mode

    def recover(self) -> None:
        """Respond as usual. Requests that hang get an error."""
        self.mode = HEALTHY
        self._recovered.set()

    async def _handle(self, request: web.Request) -> web.Response:
        self.in_flight += 1
        try:
            return await self._respond(request)
        finally:
            self.in_flight -= 1

    async def _respond(self, request: web.Request) -> web.Response:
        text, mode = await request.text(), self.mode
        try:
            body = Webhook(SECRET).verify(text, dict(request.headers))
        except WebhookVerificationError:
            self.forged += 1
            return web.Response(status=401)
        message_id = request.headers["webhook-id"]
        arrival = Arrival(request.match_info["route"], message_id, body["type"], body["data"])
        # A message is processed at once or at the end. If the sender is killed in between, it was processed or it was
        # not: the handler is cancelled then.
        latency_s, is_early = self._rng.uniform(*LATENCY_S), self._rng.random() < 0.5
        if mode in (HANGS, FAILS):
            await (self._recovered.wait() if mode == HANGS else asyncio.sleep(latency_s))
            return web.Response(status=500)
        if is_early:
            self.arrivals.append(arrival)
        await asyncio.sleep(latency_s)
        if not is_early:
            self.arrivals.append(arrival)
        if mode == DEAF and request.transport is not None:
            request.transport.abort()
        return web.Response(status=204)


@asynccontextmanager
async def receiving(seed: int) -> AsyncIterator[Receiver]:
    """Run a receiver for the block."""
    receiver = Receiver(seed)
    await receiver.start()
    try:
        yield receiver
    finally:
        receiver.recover()
        await receiver.kill()
