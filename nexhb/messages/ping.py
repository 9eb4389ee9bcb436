"""Fetch watch.ping_url after each good round of the watcher, for a dead man's switch outside."""

from __future__ import annotations

import asyncio

from nexhb import log
from nexhb.errors import DeliveryFailed
from nexhb.messages.webhooks import Webhooks

_log = log.get("notify")


class Ping:
    """Fetches the address in a task of its own, so that no round waits for it."""

    def __init__(self, webhooks: Webhooks, url: str) -> None:
        self._webhooks = webhooks
        self._url = url
        self._due = asyncio.Event()
        self._failed = False

    def send(self) -> None:
        """Let the address be fetched. If it is being fetched, it is fetched once more after that."""
        self._due.set()

    async def run(self) -> None:
        """Fetch until cancelled. Never returns."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._webhooks.ping(self._url)
                self._failed = False
            except DeliveryFailed as error:
                if not self._failed:
                    _log.warning("watch.ping_failed", error=error.detail)
                self._failed = True
