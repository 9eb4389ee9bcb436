"""The outbox: every message is delivered at least once, in order for each incident and route, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from aiohttp import web

from nexhb.config import NotifySettings, RouteSettings, Settings
from nexhb.messages import channels, delivery
from nexhb.messages.delivery import LEASE, LONGEST_RETRY, Delivery, retry_delay
from nexhb.messages.routes import routes_of
from nexhb.messages.telling import GIVEN_UP_AFTER, Teller
from nexhb.postgres.connections import Connection, Database
from nexhb.readiness import Readiness
from tests.conftest import SOON_S
from tests.support.receiver import Receiver, accept, receiving

pytestmark = pytest.mark.usefixtures("no_days")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that accepts every message."""
    async with receiving() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll and retry without delay; the lengths of the delays have a test of their own."""
    monkeypatch.setattr(delivery, "POLL_S", 0.05)
    monkeypatch.setattr(delivery, "retry_delay", lambda _: timedelta(0))


@asynccontextmanager
async def delivering(
    database: Database, *routes: RouteSettings, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> AsyncIterator[asyncio.Task[None]]:
    """Deliver messages during the block."""
    settings = Settings(notify=NotifySettings(routes=list(routes)))
    async with channels.opened(routes_of(settings), now) as opened:
        task = asyncio.create_task(Delivery(database, opened, now).run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def add(conn: Connection, route: str, *kinds: str, incidents: int = 1, age: timedelta = timedelta(0)) -> None:
    """Create `incidents` incidents, and add a message of each of these kinds about each of them, in one transaction."""
    now = datetime.now(UTC) - age
    async with conn.transaction():
        numbers = [
            row["incident_id"]
            for row in await conn.fetch(
                "INSERT INTO incidents (kind, scope, site, severity, since, opened_at) "
                "SELECT 'offline', 'site', gen_random_uuid(), 'critical', $1, $1 FROM generate_series(1, $2) "
                "RETURNING incident_id",
                now, incidents,
            )
        ]  # fmt: skip
        rows = [(number, route, kind) for kind in kinds for number in numbers]
        payloads = [f'{{"incident_id": {number}, "kind": "offline", "scope": "fleet"}}' for number, _, _ in rows]
        await conn.execute(delivery._Q["add_notifications"], *map(list, zip(*rows, strict=True)), payloads, now)
        await conn.execute(delivery._Q["wake"])


async def pending(conn: Connection) -> int:
    """Return how many messages are neither delivered nor given up."""
    count: int = await conn.fetchval(
        "SELECT count(*) FROM notifications WHERE delivered_at IS NULL AND given_up_at IS NULL"
    )
    return count


async def until_recorded(conn: Connection) -> None:
    """Wait until the outcome of every message is recorded."""
    async with asyncio.timeout(SOON_S):
        while await pending(conn):
            await asyncio.sleep(0.02)


async def test_messages_arrive_in_order_and_once(database: Database, conn: Connection, receiver: Receiver) -> None:
    async with delivering(database, receiver.route()):
        await add(conn, "on-call", "opened", "widened", "resolved", incidents=20)
        messages = await receiver.count(60)
        await until_recorded(conn)
    for number in {message.body["data"]["incident_id"] for message in messages}:
        of_incident = [m.body["type"] for m in messages if m.body["data"]["incident_id"] == number]
        assert of_incident == ["incident.opened", "incident.widened", "incident.resolved"]
    assert len(receiver.attempts) == 60


async def test_two_daemons_share_the_outbox(database: Database, conn: Connection, receiver: Receiver) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(delivering(database, receiver.route()))
        await add(conn, "on-call", "opened", "resolved", incidents=30)
        messages = await receiver.count(60)
        await until_recorded(conn)
    assert len(set(receiver.attempts)) == len(receiver.attempts) == 60
    seen: dict[int, list[str]] = {}
    for message in messages:
        seen.setdefault(message.body["data"]["incident_id"], []).append(message.body["type"])
    assert all(types == ["incident.opened", "incident.resolved"] for types in seen.values())


async def test_a_message_is_repeated_with_the_same_id_until_it_is_accepted_and_the_next_waits(
    database: Database, conn: Connection, receiver: Receiver
) -> None:
    failures = 3

    async def respond(request: web.Request) -> web.StreamResponse:
        nonlocal failures
        failures -= 1
        return web.Response(status=500) if failures >= 0 else await accept(request)

    receiver.respond = respond
    async with delivering(database, receiver.route()):
        await add(conn, "on-call", "opened", "resolved")
        await receiver.count(2)
        await until_recorded(conn)
    assert [attempt == receiver.attempts[0] for attempt in receiver.attempts] == [True] * 4 + [False]
    rows = await conn.fetch("SELECT attempts, last_error FROM notifications ORDER BY notification_no")
    assert [tuple(row) for row in rows] == [(4, "The response is 500."), (1, None)]


async def test_a_receiver_that_hangs_delays_no_other_route(
    database: Database, conn: Connection, receiver: Receiver
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        if request.path == "/slow":
            await asyncio.Event().wait()
        return await accept(request)

    receiver.respond = respond
    async with delivering(database, receiver.route("slow"), receiver.route("fast")):
        await add(conn, "slow", "opened", incidents=30)
        await receiver.until(lambda: len(receiver.attempts) == delivery.WORKERS)
        await add(conn, "fast", "opened", incidents=30)
        messages = await receiver.count(30)
        assert {message.path for message in messages} == {"/fast"}
        assert len(receiver.attempts) == 30 + delivery.WORKERS


async def test_a_message_whose_daemon_was_killed_during_the_request_is_sent_again_after_its_lease(
    database: Database, conn: Connection, receiver: Receiver
) -> None:
    async def hang(_request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    receiver.respond = hang
    await add(conn, "on-call", "opened", "resolved")
    async with delivering(database, receiver.route()):
        await receiver.until(lambda: len(receiver.attempts) == 1)
    receiver.respond = accept
    async with delivering(database, receiver.route()):
        await asyncio.sleep(0.2)  # several polls, in which the lease is respected
        assert receiver.messages == []
    async with delivering(database, receiver.route(), now=lambda: datetime.now(UTC) + LEASE):
        await receiver.count(2)
        await until_recorded(conn)
    assert receiver.attempts[0] == receiver.attempts[1] != receiver.attempts[2]


async def test_a_lost_connection_to_the_database_loses_no_outcome(
    database: Database, conn: Connection, receiver: Receiver
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        asked.set()
        await answer.wait()
        return await accept(request)

    receiver.respond = respond
    async with delivering(database, receiver.route()):
        await add(conn, "on-call", "opened")
        await asked.wait()
        await conn.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb notify' "
            "AND datname = current_database()"
        )
        answer.set()
        await until_recorded(conn)
    assert len(receiver.attempts) == 1


async def test_after_a_day_a_message_is_given_up_and_the_next_is_sent(
    database: Database, conn: Connection, receiver: Receiver
) -> None:
    await add(conn, "on-call", "opened", age=GIVEN_UP_AFTER + timedelta(minutes=1))
    await add(conn, "on-call", "opened")
    await add(conn, "gone", "opened", age=GIVEN_UP_AFTER + timedelta(minutes=1))

    async def refuse_the_old(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500) if (await request.json())["data"]["incident_id"] == 1 else await accept(request)

    receiver.respond = refuse_the_old
    async with delivering(database, receiver.route()):
        await receiver.count(1)
        teller = Teller((), Readiness())
        async with asyncio.timeout(SOON_S):
            while await pending(conn):  # a message in flight is not given up
                await teller.tidy(conn, datetime.now(UTC))
                teller = Teller((), Readiness())
    assert await conn.fetchval("SELECT count(*) FROM notifications WHERE given_up_at IS NOT NULL") == 2
    assert await conn.fetchval("SELECT delivered_at IS NOT NULL FROM notifications WHERE incident_id = 2")


def test_the_back_off_is_exponential_and_bounded() -> None:
    assert [retry_delay(attempts).total_seconds() for attempts in (1, 2, 3, 4)] == [5, 10, 20, 40]
    assert retry_delay(10_000) == LONGEST_RETRY
