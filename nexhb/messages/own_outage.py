"""Tell routes with `self = true` that nexhb itself cannot accept heartbeats, and that it can again. This works from
memory, because the database itself may be unavailable."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from nexhb import log
from nexhb.errors import DeliveryFailed
from nexhb.messages.channels import Channels
from nexhb.messages.message import NOT_READY, READY, Message
from nexhb.messages.routes import Route
from nexhb.readiness import Readiness

_log = log.get("notify")

TOLD_AFTER = timedelta(minutes=2)
CHECK_S = 1.0
LONGEST_RETRY_S = 60.0
FILE = "outage.json"


class _Stored(msgspec.Struct):
    """The outage that routes were told of, as data_dir keeps it: after a restart, the same routes are told of its end,
    and a repeated message has the same id."""

    since: datetime
    routes: list[str]
    telling: list[str] = []  # a message is on its way; if the daemon is killed now, it is in doubt whether it arrives


class OwnOutage:
    """Watches the daemon's readiness. Which messages are due follows from the present state: none is sent about an
    outage that ended before a route could be told of it."""

    def __init__(self, readiness: Readiness, channels: Channels, data_dir: Path, now: Callable[[], datetime]) -> None:
        self._readiness = readiness
        self._routes = [route for route in channels.routes.values() if route.for_nexhb]
        self._channels = channels
        self._path = data_dir / FILE
        self._now = now
        stored = self._read()
        # Since when the daemon is not ready, or the start of the outage that routes were told of.
        self._since = stored.since if stored else None
        names = {route.name for route in self._routes}
        self._told = set(stored.routes) & names if stored else set()
        self._in_doubt = set(stored.telling) & names if stored else set()  # perhaps told, before the daemon was killed
        self._telling: set[str] = set()
        self._reason = ""
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                self.check()
                await asyncio.sleep(CHECK_S)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def check(self) -> None:
        """Start a message on each route that does not know the present state."""
        now = self._now()
        if not self._readiness.is_ready:
            self._since = self._since or now
            self._reason = " ".join(self._readiness.reasons()) or self._reason
        elif not self._told | self._in_doubt | self._telling:
            self._since = None
        for route in self._routes:
            if self._is_due(route.name, now) and route.name not in self._tasks and not route.is_quiet(now):
                task = self._tasks[route.name] = asyncio.create_task(
                    self._tell(route, is_ready=self._readiness.is_ready)
                )
                task.add_done_callback(lambda _, name=route.name: self._tasks.pop(name))  # type: ignore[misc]

    def _is_due(self, route: str, now: datetime) -> bool:
        """Return whether the route does not know the present state."""
        if self._readiness.is_ready:
            return route in self._told | self._in_doubt
        return self._since is not None and now - self._since >= TOLD_AFTER and route not in self._told

    async def _tell(self, route: Route, *, is_ready: bool) -> None:
        assert self._since is not None  # noqa: S101 - there is an outage, or there was one
        message = self._message(route, self._since, is_ready=is_ready)

        def is_outdated(_: RetryCallState) -> bool:
            return self._readiness.is_ready is not is_ready or not self._is_due(route.name, self._now())

        attempts = AsyncRetrying(
            retry=retry_if_exception_type(DeliveryFailed), stop=is_outdated, reraise=True,
            wait=wait_random_exponential(multiplier=1, max=LONGEST_RETRY_S),
        )  # fmt: skip
        if not is_ready:
            self._telling.add(route.name)
            self._store()
        try:
            await attempts(self._channels.send, route, message)
        except DeliveryFailed as error:
            _log.warning("notify.failed", route=route.name, id=message.message_id, error=error.detail)
        else:
            self._in_doubt.discard(route.name)
            if is_ready:
                self._told.discard(route.name)
            else:
                self._told.add(route.name)
        self._telling.discard(route.name)
        self._store()

    def _message(self, route: Route, since: datetime, *, is_ready: bool) -> Message:
        kind, host = READY if is_ready else NOT_READY, socket.gethostname()
        digest = hashlib.sha256(f"{host} {since.isoformat()} {route.name} {kind}".encode()).hexdigest()
        data: dict[str, Any] = {"host": host, "since": since, "severity": "critical", "detail": self._reason}
        if is_ready:
            data |= {"resolved_at": self._now(), "severity": "info"}
        return Message(f"msg_{digest[:32]}", kind, since, data)

    def _read(self) -> _Stored | None:
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(self._path.read_bytes(), type=_Stored)
        return None

    def _store(self) -> None:
        """Store the outage and the routes that were told of it. If the disk is full, a restart may repeat a message."""
        try:
            telling = self._telling | self._in_doubt
            if not self._told | telling or self._since is None:
                self._path.unlink(missing_ok=True)
                return
            temporary = self._path.with_name(f".{FILE}.{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(_Stored(self._since, sorted(self._told), sorted(telling))))
            temporary.replace(self._path)
        except OSError as error:
            _log.warning("notify.outage_not_kept", error=str(error))
