"""The fast path for POST /v1/heartbeat responds like the handler of aiohttp, and in order, on connections that use
both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest
from pydantic import SecretStr

from nexhb import config, daemon
from nexhb.devices import enrolment, registry, store
from nexhb.errors import EnrolmentRefused, Overloaded
from nexhb.http.device_api.fast_path import FastPath
from nexhb.http.transport.head import Request
from nexhb.http.transport.http_connection import READ_BUFFER, HttpConnection
from nexhb.ingest.intake import Intake
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon
from tests.support.raw_connection import AROUND, RawConnection, connect, post, post_body

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each request offered to the fast path whether it was served there."""
    offered: list[bool] = []
    serve = FastPath.serve

    def counted(self: FastPath, connection: HttpConnection, request: Request) -> bool:
        offered.append(serve(self, connection, request))
        return offered[-1]

    monkeypatch.setattr(FastPath, "serve", counted)
    return offered


async def test_the_fast_path_and_the_handler_respond_alike(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent, stranger = await nexhb.agent(), Agent(nexhb, "nobody", "x" * 43)
    # A daemon learns of a new token a moment later; until then only the handler, which queries the database, serves it.
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    requests = [
        (post(agent, now), post(agent, now + timedelta(seconds=20), AROUND), True),
        (post(agent, now), post(agent, now, AROUND), True),
        (post_body(agent, b"{"), post_body(agent, b"{", AROUND), False),
        (post(agent, now, battery={"pct": 101}), post(agent, now, AROUND, battery={"pct": 101}), False),
        (post(stranger, now), post(stranger, now, AROUND), False),
    ]
    async with connect(nexhb) as fast:
        for by_fast_path, by_handler, is_fast in requests:
            served.clear()
            status, headers, body = await fast.ask(by_fast_path)
            assert served == [is_fast]
            async with connect(nexhb) as slow:
                expected = await slow.ask(by_handler)
            assert served == [is_fast], "the request for the handler was offered to the fast path"
            assert (status, body) == (expected[0], expected[2])
            for name in ("Date", "Retry-After"):
                headers.pop(name, None)
                expected[1].pop(name, None)
            assert headers == expected[1]


async def test_a_path_with_two_slashes_is_served_on_both_paths(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """An agent whose server_url ends in a slash sends to //v1/heartbeat. Formerly, it received 404."""
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200  # from here on the token is in memory
    served.clear()
    for extra, taken in ((b"", [True]), (AROUND, [True])):  # the second request is not offered to the fast path
        async with connect(nexhb) as connection:
            status, _, body = await connection.ask(post(agent, now, extra).replace(b" /v1", b" //v1", 1))
            assert (status, served, b'"deduplicated":false' in body) == (200, taken, not extra)
    for path in ("//v1/heartbeats", "//v1/register"):
        assert (await agent.post(b"", path)).status == (200 if "beats" in path else 403)


async def test_the_fast_path_bypasses_neither_a_revocation_nor_a_full_queue(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(ingest=config.IngestSettings(queue_items=1, answer_within_seconds=1))
    agent, other = await nexhb.agent(), await nexhb.agent()
    for one in (agent, other):
        assert (await one.send(now - timedelta(hours=1))).status == 200
    served.clear()
    async with (
        nexhb.database.connected(application="test") as conn,
        connect(nexhb) as connection,
        connect(nexhb) as second,
    ):
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            connection.writer.write(post(agent, now))
            async with asyncio.timeout(SOON_S):
                while not served:
                    await asyncio.sleep(0.01)
            assert (await second.ask(post(other, now)))[0] == 503
        await connection.answer()
        await registry.revoke(conn, other.device_id, now)
        async with asyncio.timeout(SOON_S):
            while (await second.ask(post(other, now)))[0] != 410:
                await asyncio.sleep(0.02)
    assert served[:2] == [True, False]
    assert not served[-1]


async def test_after_a_refusal_the_connection_can_use_the_fast_path(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    async with connect(nexhb) as connection:
        statuses = [
            (await connection.ask(data))[0]
            for data in (
                post(agent, now), post_body(agent, b"[]"), post(agent, now - timedelta(minutes=1)), HEALTH,
                post(agent, now - timedelta(minutes=2)),
            )
        ]  # fmt: skip
    assert statuses == [200, 422, 200, 200, 200]
    assert served[1:] == [False, True, True]


async def test_after_an_ambiguous_request_the_connection_is_served_by_aiohttp(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    async with connect(nexhb) as connection:
        assert (await connection.ask(post(agent, now, AROUND)))[0] == 200
        assert (await connection.ask(post(agent, now - timedelta(minutes=1))))[0] == 200
    assert served == []


async def test_a_request_in_pieces_is_served_once_it_is_complete(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    data = post(agent, now)
    async with connect(nexhb) as connection:
        for cut in (30, 400, len(data) - 1):
            connection.writer.write(data[:cut])
            await asyncio.sleep(0.05)
            assert (await connection.ask(data[cut:]))[0] == 200
    assert served == [True, True, True]


async def test_a_request_sent_right_after_connecting_is_served(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """Devices that send every ten minutes open a new connection each time."""
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    port = int(nexhb.url.rpartition(":")[2])
    for minute in range(10):
        # From a thread, so that the request is in the socket before the connection is accepted.
        data = post(agent, now - timedelta(minutes=minute))
        answers = await asyncio.gather(*(asyncio.to_thread(ask_once, port, piece) for piece in (data, data)))
        assert [answer[:15] for answer in answers] == [b"HTTP/1.1 200 OK"] * 2
    assert served == [True] * 20


def ask_once(port: int, data: bytes) -> bytes:
    """Connect, send a request, read the response and close."""
    with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as connection:
        connection.sendall(data)
        return connection.recv(4096)


async def test_a_slow_request_is_served_by_aiohttp(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent = await nexhb.agent()
    data = post(agent, now)
    async with connect(nexhb) as connection:
        connection.writer.write(data[:300])
        await asyncio.sleep(0.6)
        assert (await connection.ask(data[300:]))[0] == 200
    assert served == []


async def test_a_body_that_never_arrives_is_408(start_daemon: StartDaemon, now: datetime) -> None:
    server = config.ServerSettings(port=0, shutdown_timeout_seconds=2, body_timeout_seconds=0.5)
    nexhb = await start_daemon(server=server)
    agent = await nexhb.agent()
    async with connect(nexhb) as connection:
        assert (await connection.ask(post(agent, now)[:-1]))[0] == 408


async def test_pipelined_requests_receive_their_responses_in_order(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    made = [now - timedelta(minutes=number) for number in range(20)]
    async with connect(nexhb) as connection:
        connection.writer.write(post(agent, made[0]))
        await asyncio.sleep(0)
        for moment in made[1:]:
            connection.writer.write(post(agent, moment))
        connection.writer.write(HEALTH)
        answers = [await connection.answer() for _ in range(21)]
    assert [status for status, _, _ in answers] == [200] * 21
    assert b"next_heartbeat_seconds" in answers[0][2]
    assert b"next_heartbeat_seconds" not in answers[20][2]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 21


async def test_bytes_sent_before_the_response_are_buffered_within_a_limit(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    connections: list[HttpConnection] = []
    serve = FastPath.serve

    def noted(self: FastPath, connection: HttpConnection, request: Request) -> bool:
        connections.append(connection)
        return serve(self, connection, request)

    monkeypatch.setattr(FastPath, "serve", noted)
    large = post_body(agent, b"[" + b" " * 60_000 + b"]")
    async with nexhb.database.connected(application="test") as conn, connect(nexhb) as connection:
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            connection.writer.write(post(agent, now))
            async with asyncio.timeout(SOON_S):
                while not connections:
                    await asyncio.sleep(0.01)
                connection.writer.write(large * 20)
                while len(connections[0]._pending_bytes) <= READ_BUFFER:
                    await asyncio.sleep(0.01)
            for _ in range(20):
                await conn.execute("SELECT 1")  # long enough for the rest to arrive
            held = len(connections[0]._pending_bytes)
        statuses = [(await connection.answer())[0] for _ in range(21)]
    assert held <= READ_BUFFER + 2**18, "the limit plus one read of the socket"
    assert statuses[0] in {200, 503}
    assert statuses[1:] == [422] * 20


async def test_the_heartbeat_of_a_client_that_disconnects_is_still_committed(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    async with connect(nexhb) as connection:
        connection.writer.write(post(agent, now))
        await connection.writer.drain()
    async with asyncio.timeout(SOON_S):
        while len(await nexhb.rows("SELECT FROM device_heartbeats")) < 2:
            await asyncio.sleep(0.02)
    assert (await agent.send(now)).body["deduplicated"]


async def test_a_heartbeat_that_cannot_be_committed_is_503(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(ingest=config.IngestSettings(answer_within_seconds=1))
    agent = await nexhb.agent()
    async with nexhb.database.connected(application="test") as conn, connect(nexhb) as connection:
        assert (await connection.ask(post(agent, now - timedelta(hours=1))))[0] == 200
        served.clear()
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            status, headers, body = await connection.ask(post(agent, now))
        assert status == 503
        assert served == [True]
        assert headers["Content-Type"] == "application/problem+json"
        assert 2 <= int(headers["Retry-After"]) <= 12
        assert orjson.loads(body)["status"] == 503
        async with asyncio.timeout(SOON_S):
            while (status := (await connection.ask(post(agent, now)))[0]) == 503:
                await asyncio.sleep(0.2)
        assert status == 200


async def test_a_stopping_daemon_responds_to_admitted_heartbeats_and_closes_the_connection(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    server = config.ServerSettings(port=0, shutdown_timeout_seconds=10)
    async with (
        nexhb.database.connected(application="test") as conn,
        AsyncExitStack() as stack,
        asyncio.TaskGroup() as tasks,
    ):
        running = await stack.enter_async_context(daemon.running(nexhb.settings.model_copy(update={"server": server})))
        async with connect(replace(nexhb, url=running.url)) as connection:
            async with conn.transaction():
                await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
                connection.writer.write(post(agent, now))
                async with asyncio.timeout(SOON_S):
                    while not served:
                        await asyncio.sleep(0.01)
                stopping = tasks.create_task(stack.aclose())
                await asyncio.sleep(0.2)
                assert not stopping.done()
            status, headers, _ = await connection.answer()
            assert (status, headers["Connection"]) == (200, "close")
            assert await connection.reader.read() == b""


async def test_a_request_inside_a_body_is_not_served(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """Otherwise the author of a body could send requests as the owner of the connection."""
    agent = await nexhb.agent()
    inner = post(agent, now)
    async with connect(nexhb) as connection:
        head = f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
        connection.writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(inner))
        await asyncio.sleep(0.1)
        connection.writer.write(inner)
        await asyncio.sleep(0.1)
        connection.writer.write(b"\r\n0\r\n\r\n")
        await asyncio.sleep(0.1)
        assert (await connection.ask(HEALTH))[2] != b"", "the list and this request each get a response"
        status, _, body = await connection.answer()
        assert status == 200
        assert orjson.loads(body)["ok"]
    assert served == []


# ---- rate limits and keys, on both paths
# ------------------------------------------------------------------------------

# Allows four requests at once, and the next one only hours later, so that the result does not depend on how slow the
# machine is.
FOUR = config.IngestSettings(answer_within_seconds=1).model_copy(update={"device_burst": 4, "device_per_minute": 0.001})


async def statuses_of(nexhb: Nexhb, requests: list[bytes]) -> list[int]:
    """Return the status of each request, sent at once on separate connections."""

    async def ask(request: bytes) -> int:
        async with connect(nexhb) as connection:
            return (await connection.ask(request))[0]

    return await asyncio.gather(*map(ask, requests))


async def test_a_refused_heartbeat_counts_once_towards_the_rate_limit_and_an_unstored_one_not_at_all(
    start_daemon: StartDaemon, now: datetime, served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds on both paths: a heartbeat that the fast path passes on to aiohttp is not counted twice, and one that
    received 503 is not counted."""
    nexhb = await start_daemon(ingest=FOUR)
    agents = {extra: [await nexhb.agent() for _ in range(2)] for extra in (b"", AROUND)}
    for both in agents.values():
        for agent in both:
            assert (await agent.send(now - timedelta(hours=1))).status == 200  # the first of four allowed requests
    for extra, (refused, _) in agents.items():
        async with connect(nexhb) as connection:
            statuses = [(await connection.ask(post(refused, now, extra, battery={"pct": 101})))[0] for _ in range(4)]
        assert statuses == [422, 422, 422, 429], extra

    def three_each(turn: int) -> list[bytes]:
        return [
            post(unkept, now - timedelta(minutes=3 * turn + number), extra)
            for extra, (_, unkept) in agents.items()
            for number in range(3)
        ]

    served.clear()
    async with nexhb.database.connected(application="test") as conn, conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        assert await statuses_of(nexhb, three_each(0)) == [503] * 6
        assert served == [True] * 3
    async with asyncio.timeout(60):
        while (await nexhb.http.get(f"{nexhb.url}/readyz")).status != 200:
            await asyncio.sleep(0.05)
    with monkeypatch.context() as patch:  # the intake fills up between its check and the admission
        patch.setattr(Intake, "has_room", False)
        patch.setattr(Intake, "admit", raising(Overloaded("10000 heartbeats wait to be committed.")))
        assert await statuses_of(nexhb, three_each(1)) == [503] * 6
    assert await statuses_of(nexhb, three_each(2)) == [200] * 6
    assert await statuses_of(nexhb, three_each(3)[::3]) == [429] * 2


def raising(error: Exception) -> Callable[..., Any]:
    """Return a function that raises this error."""

    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


async def test_after_too_many_wrong_keys_the_database_is_not_queried(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, the database was queried although the client received 429 in any case, so that the query went
    unnoticed."""
    auth = config.AuthSettings(admin_key=SecretStr(ADMIN_KEY), enrolment="open")
    # One failure is allowed at once, the next one after 5 min.
    nexhb = await start_daemon(auth=auth.model_copy(update={"failures_per_minute": 0.2}))
    queried: list[str] = []

    async def find(_self: object, _token_hash: bytes) -> None:
        queried.append("find")

    async def enrol(*_: object) -> str:
        queried.append("enrol")
        raise EnrolmentRefused

    monkeypatch.setattr(store.DeviceStore, "look_up", find)
    monkeypatch.setattr(enrolment, "enrol", enrol)
    stranger = Agent(nexhb, "nobody", "x" * 43)
    paths = ("/v1/heartbeat", "/v1/heartbeat", "/v1/heartbeats", "/v1/register")
    statuses = [(await stranger.post(b"{}", path)).status for path in paths]
    assert (statuses, queried) == ([401, 429, 429, 429], ["find"])
    for key, status in (("wrong", 429), (ADMIN_KEY, 200)):
        async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers={"x-admin": key}) as response:
            assert response.status == status


async def test_an_authenticated_connection_is_kept_whichever_path_served_it(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(server=config.ServerSettings(port=0, shutdown_timeout_seconds=2, connections_max=10))
    agent = await nexhb.agent()
    async with AsyncExitStack() as stack:
        connection, *others = [await stack.enter_async_context(connect(nexhb)) for _ in range(4)]
        assert (await connection.ask(post(agent, now)))[0] == 200
        served.clear()
        queue = post_body(agent, b"[]").replace(b"/v1/heartbeat ", b"/v1/heartbeats ")
        admin = f"GET /v1/fleet HTTP/1.1\r\nHost: x\r\nx-admin: {ADMIN_KEY}\r\n\r\n".encode()
        requests = (post(agent, now), queue, admin)
        assert [(await one.ask(data))[0] for one, data in zip(others, requests, strict=True)] == [200] * 3
        assert served == [True]
        idle = [await stack.enter_async_context(connect(nexhb)) for _ in range(20)]
        async with asyncio.timeout(SOON_S):
            assert await ended(idle[0])  # the first connection to be closed when there are too many
        assert [(await one.ask(HEALTH))[0] for one in (connection, *others)] == [200] * 4


async def ended(connection: RawConnection) -> bool:
    """Return whether the connection was closed without a response."""
    try:
        return await connection.reader.read() == b""
    except ConnectionError:
        return True
