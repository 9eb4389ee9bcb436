"""Deliver the messages of the outbox: every daemon does, at least once, in order for each incident and route.

A message is claimed by a lease, and no transaction is open during a request. If the daemon is killed during a request,
the lease expires, and the message is sent again with the same id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

from nexhb import log
from nexhb.errors import DeliveryFailed, described
from nexhb.messages.channels import TIMEOUT_S, Channels
from nexhb.messages.message import Message
from nexhb.messages.routes import Route
from nexhb.postgres import sql
from nexhb.postgres.connections import Connection, Database
from nexhb.postgres.errors import FROM_THE_DATABASE
from nexhb.postgres.identity import DatabaseTracker

_Q = sql.queries("messages")
_log = log.get("notify")

CHANNEL = "nexhb_notifications"
WORKERS = 4  # of one route: a receiver that hangs delays no other route
LEASE = timedelta(seconds=TIMEOUT_S + 15)
POLL_S = 5.0  # in case a notification was lost, and for messages that are due again
RESPONSE_TIMEOUT_S = 10.0
FIRST_RETRY, LONGEST_RETRY = timedelta(seconds=5), timedelta(minutes=10)


def retry_delay(attempts: int) -> timedelta:
    """Return how long to wait after this number of failed attempts. The time of the next attempt is in the database, so
    that a restart neither repeats a message at once nor begins the back-off anew."""
    doublings: int = 2 ** min(attempts - 1, 20)
    return min(FIRST_RETRY * doublings, LONGEST_RETRY)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The outcome of an attempt."""

    message_id: str
    attempts: int
    lease_until: datetime
    error: str  # empty if the message was delivered


class Delivery:
    """Claims and sends messages until cancelled."""

    def __init__(
        self,
        database: Database,
        channels: Channels,
        now: Callable[[], datetime],
        tracker: DatabaseTracker | None = None,
    ) -> None:
        self._database = database
        self._channels = channels
        self._now = now
        self._wake = asyncio.Event()
        self._tasks: dict[str, set[asyncio.Task[None]]] = {name: set() for name in channels.routes}
        self._outcomes: list[_Attempt] = []  # not in the database yet
        self._failing: set[str] = set()  # routes whose last attempt failed: one message at a time
        self._conn: Connection | None = None
        if tracker is not None:
            tracker.on_change(self._terminate)

    def _terminate(self) -> None:
        if self._conn is not None:
            self._conn.terminate()

    async def run(self) -> None:
        """Deliver messages until cancelled, reconnecting after errors of the database."""
        try:
            while True:
                try:
                    await self._follow()
                except FROM_THE_DATABASE as error:
                    _log.info("notify.database_lost", error=described(error))
                    await asyncio.sleep(POLL_S)
        finally:
            tasks = [task for of_route in self._tasks.values() for task in of_route]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        self._conn = conn = await self._database.connect(
            application="nexhb notify", command_timeout_s=RESPONSE_TIMEOUT_S, timeout_s=RESPONSE_TIMEOUT_S
        )
        try:
            conn.add_termination_listener(lambda _: self._wake.set())
            await conn.add_listener(CHANNEL, lambda *_: self._wake.set())
            while True:
                self._wake.clear()
                await self._record(conn)
                await self._claim(conn)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._wake.wait()
        finally:
            with suppress(Exception):
                await conn.close(timeout=2)

    async def _record(self, conn: Connection) -> None:
        """Record the outcomes of attempts. An outcome that cannot be recorded is kept."""
        while self._outcomes:
            done = self._outcomes[0]
            now = self._now()
            if done.error:
                due_at = now + retry_delay(done.attempts)
                await conn.execute(_Q["failed"], done.message_id, done.lease_until, due_at, done.error)
            else:
                await conn.execute(_Q["delivered"], done.message_id, now)
            del self._outcomes[0]

    async def _claim(self, conn: Connection) -> None:
        """Claim messages that are due, and start an attempt for each."""
        for row in await conn.fetch(_Q["routes_with_messages"], self._now()):
            route = self._channels.routes.get(row["route"])
            if route is None:
                continue
            limit = 1 if route.name in self._failing else WORKERS
            free = limit - len(self._tasks[route.name])
            if free > 0:
                now = self._now()
                for claimed in await conn.fetch(_Q["claim"], route.name, now, now + LEASE, free):
                    self._start(route, claimed, now + LEASE)

    def _start(self, route: Route, row: Any, lease_until: datetime) -> None:
        message = Message(row["id"], row["kind"], row["created_at"], orjson.loads(row["payload"]))
        task = asyncio.create_task(self._attempt(route, message, row["attempts"], lease_until))
        tasks = self._tasks[route.name]
        tasks.add(task)

        def ended(_: object) -> None:
            tasks.discard(task)
            self._wake.set()

        task.add_done_callback(ended)

    async def _attempt(self, route: Route, message: Message, attempts: int, lease_until: datetime) -> None:
        error = ""
        try:
            await self._channels.send(route, message)
            self._failing.discard(route.name)
        except DeliveryFailed as failure:
            self._failing.add(route.name)
            error = failure.detail
            _log.warning("notify.failed", route=route.name, id=message.message_id, attempts=attempts, error=error)
        self._outcomes.append(_Attempt(message.message_id, attempts, lease_until, error))
