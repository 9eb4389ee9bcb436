"""POST /v1/heartbeat around aiohttp: answered as aiohttp's way answers, in order, on lines that carry both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest
from pydantic import SecretStr

from nexhb import config, daemon, devices
from nexhb.errors import EnrolmentRefused, Overloaded
from nexhb.http.connections import READ_BUFFER, Guarded
from nexhb.http.express import Express
from nexhb.http.head import Request
from nexhb.intake import Intake
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon, example

AROUND = b"X-Around: no\r\n"  # a field that is not known there: aiohttp's way
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A line for each request that was offered to the way around: whether it took it."""
    offered: list[bool] = []
    serve = Express.serve

    def counted(self: Express, connection: Guarded, request: Request) -> bool:
        offered.append(serve(self, connection, request))
        return offered[-1]

    monkeypatch.setattr(Express, "serve", counted)
    return offered


class Line:
    """A bare connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next one: status, headers, body."""
        async with asyncio.timeout(SOON_S):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = text.strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["Content-Length"]))

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send, and hear."""
        self.writer.write(data)
        return await self.answer()


@asynccontextmanager
async def line_to(nexhb: Nexhb) -> AsyncIterator[Line]:
    """Open one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(nexhb.url.rpartition(":")[2]))
    try:
        yield Line(reader, writer)
    finally:
        writer.close()


def post(agent: Agent, made_at: datetime, extra: bytes = b"", **changes: Any) -> bytes:
    """A heartbeat's request."""
    return post_body(agent, orjson.dumps(example(made_at, device_id=agent.device_id, **changes)), extra)


def post_body(agent: Agent, body: bytes, extra: bytes = b"") -> bytes:
    """A request with this body."""
    head = f"POST /v1/heartbeat HTTP/1.1\r\nAuthorization: Bearer {agent.token}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + extra + b"Content-Type: application/json\r\nHost: x\r\n\r\n" + body


async def test_both_ways_answer_the_same(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent, stranger = await nexhb.agent(), Agent(nexhb, "nobody", "x" * 43)
    # A daemon hears of a new token a moment later, and until then asks the database: the way around does not.
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    asked = [
        (post(agent, now), post(agent, now + timedelta(seconds=20), AROUND), True),
        (post(agent, now), post(agent, now, AROUND), True),
        (post_body(agent, b"{"), post_body(agent, b"{", AROUND), False),
        (post(agent, now, battery={"pct": 101}), post(agent, now, AROUND, battery={"pct": 101}), False),
        (post(stranger, now), post(stranger, now, AROUND), False),
    ]
    async with line_to(nexhb) as direct:
        for one, other, taken in asked:
            served.clear()
            status, headers, body = await direct.ask(one)
            assert served == [taken]
            async with line_to(nexhb) as around:
                expected = await around.ask(other)
            assert served == [taken], "the other was not offered at all"
            assert (status, body) == (expected[0], expected[2])
            for name in ("Date", "Retry-After"):
                headers.pop(name, None)
                expected[1].pop(name, None)
            assert headers == expected[1]


async def test_a_second_slash_leads_the_same_two_ways(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """An agent whose server_url ends in a slash sends to //v1/heartbeat, and heard 404."""
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200  # the token is known from here on
    served.clear()
    for extra, taken in ((b"", [True]), (AROUND, [True])):  # the second is not offered at all
        async with line_to(nexhb) as line:
            status, _, body = await line.ask(post(agent, now, extra).replace(b" /v1", b" //v1", 1))
            assert (status, served, b'"deduplicated":false' in body) == (200, taken, not extra)
    for path in ("//v1/heartbeats", "//v1/register"):
        assert (await agent.post(b"", path)).status == (200 if "beats" in path else 403)


async def test_neither_a_revoked_device_nor_a_full_queue_is_passed_by(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(ingest=config.Ingest(queue_items=1, answer_within_seconds=1))
    agent, other = await nexhb.agent(), await nexhb.agent()
    for one in (agent, other):
        assert (await one.send(now - timedelta(hours=1))).status == 200
    served.clear()
    async with nexhb.database.connected(application="test") as conn, line_to(nexhb) as line, line_to(nexhb) as second:
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            line.writer.write(post(agent, now))
            async with asyncio.timeout(SOON_S):
                while not served:
                    await asyncio.sleep(0.01)
            assert (await second.ask(post(other, now)))[0] == 503
        await line.answer()
        await devices.revoke(conn, other.device_id, now)
        async with asyncio.timeout(SOON_S):
            while (await second.ask(post(other, now)))[0] != 410:
                await asyncio.sleep(0.02)
    assert served[:2] == [True, False]
    assert not served[-1]


async def test_a_refusal_leaves_the_line_to_the_way_around(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent = await nexhb.agent()
    async with line_to(nexhb) as line:
        statuses = [
            (await line.ask(data))[0]
            for data in (
                post(agent, now), post_body(agent, b"[]"), post(agent, now - timedelta(minutes=1)), HEALTH,
                post(agent, now - timedelta(minutes=2)),
            )
        ]  # fmt: skip
    assert statuses == [200, 422, 200, 200, 200]
    assert served[1:] == [False, True, True]


async def test_what_left_a_doubt_leaves_the_line_to_aiohttp(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent = await nexhb.agent()
    async with line_to(nexhb) as line:
        assert (await line.ask(post(agent, now, AROUND)))[0] == 200
        assert (await line.ask(post(agent, now - timedelta(minutes=1))))[0] == 200
    assert served == []


async def test_a_request_in_pieces_is_taken_when_it_is_whole(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    data = post(agent, now)
    async with line_to(nexhb) as line:
        for cut in (30, 400, len(data) - 1):
            line.writer.write(data[:cut])
            await asyncio.sleep(0.05)
            assert (await line.ask(data[cut:]))[0] == 200
    assert served == [True, True, True]


async def test_who_connects_and_sends_at_once_is_taken_as_well(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """A fleet that comes every ten minutes opens a connection each time."""
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    port = int(nexhb.url.rpartition(":")[2])
    for minute in range(10):
        # From a thread: the request lies in the socket when the connection is accepted.
        data = post(agent, now - timedelta(minutes=minute))
        answers = await asyncio.gather(*(asyncio.to_thread(ask_once, port, piece) for piece in (data, data)))
        assert [answer[:15] for answer in answers] == [b"HTTP/1.1 200 OK"] * 2
    assert served == [True] * 20


def ask_once(port: int, data: bytes) -> bytes:
    """Connect, send, hear, close."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(data)
        return line.recv(4096)


async def test_one_that_takes_its_time_is_aiohttps_and_answered(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    data = post(agent, now)
    async with line_to(nexhb) as line:
        line.writer.write(data[:300])
        await asyncio.sleep(0.6)
        assert (await line.ask(data[300:]))[0] == 200
    assert served == []


async def test_a_body_that_never_comes_is_answered_408(start_daemon: StartDaemon, now: datetime) -> None:
    server = config.Server(port=0, shutdown_timeout_seconds=2, body_timeout_seconds=0.5)
    nexhb = await start_daemon(server=server)
    agent = await nexhb.agent()
    async with line_to(nexhb) as line:
        assert (await line.ask(post(agent, now)[:-1]))[0] == 408


async def test_requests_sent_before_the_answer_are_answered_in_their_order(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    served.clear()
    made = [now - timedelta(minutes=number) for number in range(20)]
    async with line_to(nexhb) as line:
        line.writer.write(post(agent, made[0]))
        await asyncio.sleep(0)
        for moment in made[1:]:
            line.writer.write(post(agent, moment))
        line.writer.write(HEALTH)
        answers = [await line.answer() for _ in range(21)]
    assert [status for status, _, _ in answers] == [200] * 21
    assert b"next_heartbeat_seconds" in answers[0][2]
    assert b"next_heartbeat_seconds" not in answers[20][2]
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 21


async def test_what_is_sent_before_the_answer_is_held_within_a_bound_and_answered_in_its_turn(
    nexhb: Nexhb, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    lines: list[Guarded] = []
    serve = Express.serve

    def noted(self: Express, connection: Guarded, request: Request) -> bool:
        lines.append(connection)
        return serve(self, connection, request)

    monkeypatch.setattr(Express, "serve", noted)
    large = post_body(agent, b"[" + b" " * 60_000 + b"]")
    async with nexhb.database.connected(application="test") as conn, line_to(nexhb) as line:
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            line.writer.write(post(agent, now))
            async with asyncio.timeout(SOON_S):
                while not lines:
                    await asyncio.sleep(0.01)
                line.writer.write(large * 20)
                while len(lines[0]._held) <= READ_BUFFER:
                    await asyncio.sleep(0.01)
            for _ in range(20):
                await conn.execute("SELECT 1")  # the rest could have come by now
            held = len(lines[0]._held)
        found = [(await line.answer())[0] for _ in range(21)]
    assert held <= READ_BUFFER + 2**18, "and one read of the socket"
    assert found[0] in {200, 503}
    assert found[1:] == [422] * 20


async def test_who_leaves_before_the_answer_is_committed_all_the_same(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now - timedelta(hours=1))).status == 200
    async with line_to(nexhb) as line:
        line.writer.write(post(agent, now))
        await line.writer.drain()
    async with asyncio.timeout(SOON_S):
        while len(await nexhb.rows("SELECT FROM device_heartbeats")) < 2:
            await asyncio.sleep(0.02)
    assert (await agent.send(now)).body["deduplicated"]


async def test_what_cannot_be_committed_is_answered_503(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(ingest=config.Ingest(answer_within_seconds=1))
    agent = await nexhb.agent()
    async with nexhb.database.connected(application="test") as conn, line_to(nexhb) as line:
        assert (await line.ask(post(agent, now - timedelta(hours=1))))[0] == 200
        served.clear()
        async with conn.transaction():
            await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
            status, headers, body = await line.ask(post(agent, now))
        assert status == 503
        assert served == [True]
        assert headers["Content-Type"] == "application/problem+json"
        assert 2 <= int(headers["Retry-After"]) <= 12
        assert orjson.loads(body)["status"] == 503
        async with asyncio.timeout(SOON_S):
            while (status := (await line.ask(post(agent, now)))[0]) == 503:
                await asyncio.sleep(0.2)
        assert status == 200


async def test_a_daemon_that_stops_answers_what_it_took_and_closes(
    nexhb: Nexhb, now: datetime, served: list[bool]
) -> None:
    agent = await nexhb.agent()
    server = config.Server(port=0, shutdown_timeout_seconds=10)
    async with (
        nexhb.database.connected(application="test") as conn,
        AsyncExitStack() as stack,
        asyncio.TaskGroup() as tasks,
    ):
        running = await stack.enter_async_context(daemon.running(nexhb.settings.model_copy(update={"server": server})))
        async with line_to(replace(nexhb, url=running.url)) as line:
            async with conn.transaction():
                await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
                line.writer.write(post(agent, now))
                async with asyncio.timeout(SOON_S):
                    while not served:
                        await asyncio.sleep(0.01)
                stopping = tasks.create_task(stack.aclose())
                await asyncio.sleep(0.2)
                assert not stopping.done()
            status, headers, _ = await line.answer()
            assert (status, headers["Connection"]) == (200, "close")
            assert await line.reader.read() == b""


async def test_a_request_within_a_body_is_a_body(nexhb: Nexhb, now: datetime, served: list[bool]) -> None:
    """Were it read as one, whoever writes a body would speak for whoever owns the line."""
    agent = await nexhb.agent()
    inner = post(agent, now)
    async with line_to(nexhb) as line:
        head = f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
        line.writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(inner))
        await asyncio.sleep(0.1)
        line.writer.write(inner)
        await asyncio.sleep(0.1)
        line.writer.write(b"\r\n0\r\n\r\n")
        await asyncio.sleep(0.1)
        assert (await line.ask(HEALTH))[2] != b"", "one answer to the list, one to this"
        status, _, body = await line.answer()
        assert status == 200
        assert orjson.loads(body)["ok"]
    assert served == []


# ---- allowances and keys, on both ways -------------------------------------------------------------------------------

# Four at once, and the next in hours: whatever the machine does meanwhile, nobody regains one.
FOUR = config.Ingest(answer_within_seconds=1).model_copy(update={"device_burst": 4, "device_per_minute": 0.001})


async def statuses_of(nexhb: Nexhb, requests: list[bytes]) -> list[int]:
    """What each hears, on lines of their own, at once."""

    async def ask(request: bytes) -> int:
        async with line_to(nexhb) as line:
            return (await line.ask(request))[0]

    return await asyncio.gather(*map(ask, requests))


async def test_a_devices_allowance_pays_once_for_what_is_refused_and_nothing_for_what_is_not_kept(
    start_daemon: StartDaemon, now: datetime, served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both ways: what the way around hands on to aiohttp is not paid for twice, and a 503 is given back."""
    nexhb = await start_daemon(ingest=FOUR)
    agents = {extra: [await nexhb.agent() for _ in range(2)] for extra in (b"", AROUND)}
    for both in agents.values():
        for agent in both:
            assert (await agent.send(now - timedelta(hours=1))).status == 200  # the first of four
    for extra, (refused, _) in agents.items():
        async with line_to(nexhb) as line:
            found = [(await line.ask(post(refused, now, extra, battery={"pct": 101})))[0] for _ in range(4)]
        assert found == [422, 422, 422, 429], extra

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
    with monkeypatch.context() as patch:  # it fills between the look at it and this
        patch.setattr(Intake, "has_room", False)
        patch.setattr(Intake, "admit", raising(Overloaded("10000 heartbeats wait to be committed.")))
        assert await statuses_of(nexhb, three_each(1)) == [503] * 6
    assert await statuses_of(nexhb, three_each(2)) == [200] * 6
    assert await statuses_of(nexhb, three_each(3)[::3]) == [429] * 2


def raising(error: Exception) -> Callable[..., Any]:
    """A function that raises it."""

    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


async def test_who_has_guessed_too_often_costs_the_database_nothing_more(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears 429 in any case: the look-up before it was what went unnoticed."""
    auth = config.Auth(admin_key=SecretStr(ADMIN_KEY), enrolment="open")
    nexhb = await start_daemon(auth=auth.model_copy(update={"failures_per_minute": 0.2}))  # one, and no other for 5 min
    asked: list[str] = []

    async def find(_self: object, _token_hash: bytes) -> None:
        asked.append("find")

    async def enrol(*_: object) -> str:
        asked.append("enrol")
        raise EnrolmentRefused

    monkeypatch.setattr(devices.DeviceStore, "find", find)
    monkeypatch.setattr(devices, "enrol", enrol)
    stranger = Agent(nexhb, "nobody", "x" * 43)
    paths = ("/v1/heartbeat", "/v1/heartbeat", "/v1/heartbeats", "/v1/register")
    heard = [(await stranger.post(b"{}", path)).status for path in paths]
    assert (heard, asked) == ([401, 429, 429, 429], ["find"])
    for key, status in (("wrong", 429), (ADMIN_KEY, 200)):
        async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers={"x-admin": key}) as response:
            assert response.status == status


async def test_whoever_showed_a_key_keeps_his_line_whichever_way_took_it(
    start_daemon: StartDaemon, now: datetime, served: list[bool]
) -> None:
    nexhb = await start_daemon(server=config.Server(port=0, shutdown_timeout_seconds=2, connections_max=10))
    agent = await nexhb.agent()
    async with AsyncExitStack() as stack:
        line, *others = [await stack.enter_async_context(line_to(nexhb)) for _ in range(4)]
        assert (await line.ask(post(agent, now)))[0] == 200
        served.clear()
        queue = post_body(agent, b"[]").replace(b"/v1/heartbeat ", b"/v1/heartbeats ")
        admin = f"GET /v1/fleet HTTP/1.1\r\nHost: x\r\nx-admin: {ADMIN_KEY}\r\n\r\n".encode()
        asked = (post(agent, now), queue, admin)
        assert [(await one.ask(data))[0] for one, data in zip(others, asked, strict=True)] == [200] * 3
        assert served == [True]
        idle = [await stack.enter_async_context(line_to(nexhb)) for _ in range(20)]
        async with asyncio.timeout(SOON_S):
            assert await ended(idle[0])  # the first to go, where there are too many
        assert [(await one.ask(HEALTH))[0] for one in (line, *others)] == [200] * 4


async def ended(line: Line) -> bool:
    """Whether it was closed without a word."""
    try:
        return await line.reader.read() == b""
    except ConnectionError:
        return True
