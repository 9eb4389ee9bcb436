"""A device of which NexMDM keeps only a bcrypt hash goes on with its token; a stranger costs little."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from bench.nexmdm import token_hash
from nexhb import devices
from nexhb.db import Connection, Database
from nexhb.http import adoption
from nexhb.legacy import adopt
from nexhb.legacy.adopt import Adoption, Standing
from tests.conftest import SOON_S, Agent, Answer, Nexhb, StartDaemon, example

ADDRESS = "192.0.2.1"


async def leave_hash(conn: Connection, device_id: str, bcrypt: str) -> int:
    """A device as the import leaves one that has nothing but a hash."""
    number: int = await conn.fetchval("INSERT INTO devices (device_id) VALUES ($1) RETURNING device_no", device_id)
    fingerprint = hashlib.sha256(f"{device_id}{bcrypt}".encode()).digest()
    await conn.execute(
        "INSERT INTO legacy_tokens (device_no, fingerprint, bcrypt, taken_at) VALUES ($1, $2, $3, clock_timestamp())",
        number, fingerprint, bcrypt,
    )  # fmt: skip
    return number


async def waiting(conn: Connection) -> int:
    """How many hashes wait."""
    return int(await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE bcrypt IS NOT NULL"))


async def until_answered(send: Callable[[], Awaitable[Answer]]) -> tuple[Answer, set[int]]:
    """The first answer that is no 503, and what was said before."""
    before: set[int] = set()
    while (answer := await send()).status == 503:
        assert "Retry-After" in answer.headers
        before.add(answer.status)
        await asyncio.sleep(0.02)
    return answer, before


# ---- as a device sees it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("claims", ["itself", "another", "nothing"])
async def test_a_device_goes_on_with_its_token_and_never_hears_401(nexhb: Nexhb, conn: Connection, claims: str) -> None:
    for n in range(3):
        await leave_hash(conn, f"other-{n}", token_hash(devices.new_token()))
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    body = example(datetime.now(UTC), device_id={"itself": "kiosk-1", "another": "other-1", "nothing": None}[claims])
    answer, before = await until_answered(lambda: agent.post(orjson.dumps(body)))
    assert (answer.status, before) == (200, {503})
    assert await conn.fetchval("SELECT token_sha256 FROM device_tokens") == devices.hash_token(token)
    assert (
        await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE adopted_at IS NOT NULL AND bcrypt IS NULL") == 1
    )
    assert await waiting(conn) == 3
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history") == "kiosk-1"


async def test_a_replayed_queue_is_adopted_too(nexhb: Nexhb, conn: Connection) -> None:
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    body = orjson.dumps(example(datetime.now(UTC), device_id="kiosk-1")) + b"\n"
    answer, _ = await until_answered(
        lambda: agent.post(2 * body, "/v1/heartbeats", **{"Content-Type": "application/x-ndjson"})
    )
    assert (answer.status, answer.body["written"]) == (200, 1)


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_queue_too_long_to_be_looked_through_is_adopted_too(
    nexhb: Nexhb, conn: Connection, chunked: bool
) -> None:
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    beat = orjson.dumps(example(datetime.now(UTC), filler="x" * 50_000)) + b"\n"
    beats = 40 * [beat]  # 2 MB

    async def pieces() -> AsyncIterator[bytes]:
        for each in beats:
            yield each

    answer, before = await until_answered(
        lambda: agent.post(pieces() if chunked else io.BytesIO(b"".join(beats)), "/v1/heartbeats")
    )
    assert (answer.status, before) == (200, {503})


async def test_every_daemon_hears_of_it(start_daemon: StartDaemon, conn: Connection) -> None:
    one, other = await start_daemon(), await start_daemon()
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await until_answered(lambda: Agent(one, "kiosk-1", token).send(datetime.now(UTC)))
    answer, before = await until_answered(lambda: Agent(other, "kiosk-1", token).send(datetime.now(UTC)))
    assert (answer.status, before) == (200, set())


async def test_a_revoked_device_hears_410(nexhb: Nexhb, conn: Connection) -> None:
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await devices.revoke(conn, "kiosk-1", datetime.now(UTC))
    answer, before = await until_answered(lambda: Agent(nexhb, "kiosk-1", token).send(datetime.now(UTC)))
    assert (answer.status, before) == (410, {503})


@pytest.mark.parametrize("heard", [True, False])
async def test_a_readmitted_device_is_adopted_whether_it_was_heard_meanwhile_or_not(
    nexhb: Nexhb, conn: Connection, heard: bool
) -> None:
    token = devices.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await devices.revoke(conn, "kiosk-1", datetime.now(UTC))
    agent = Agent(nexhb, "kiosk-1", token)
    if heard:
        answer, _ = await until_answered(lambda: agent.send(datetime.now(UTC)))
        assert answer.status == 410
    # Its token, or the hash that still waits for it.
    assert await devices.readmit(conn, "kiosk-1") == devices.Readmitted(was_revoked=True, tokens=1)
    async with asyncio.timeout(SOON_S):
        while (await agent.send(datetime.now(UTC))).status != 200:
            pass


async def test_a_stranger_hears_401_once_every_hash_was_tried_and_then_at_once(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        await leave_hash(conn, f"kiosk-{n}", token_hash(devices.new_token()))
    stranger = Agent(nexhb, "kiosk-1", devices.new_token())
    answer, before = await until_answered(lambda: stranger.send(datetime.now(UTC)))
    assert (answer.status, before) == (401, {503})
    assert (await stranger.send(datetime.now(UTC))).status == 401
    assert await waiting(conn) == 5
    # A hash that came since may be his: heard of once the moment is over for which a wrong token is remembered.
    monkeypatch.setattr(devices, "MISS_HOLDS_S", 0.0)
    await leave_hash(conn, "new", token_hash(stranger.token))
    answer, before = await until_answered(lambda: stranger.send(datetime.now(UTC)))
    assert (answer.status, before) == (200, {503})


async def test_with_no_hash_left_an_unknown_token_is_401_at_once(nexhb: Nexhb, conn: Connection) -> None:
    await leave_hash(conn, "kiosk-1", token_hash(devices.new_token()))
    await devices.rotate(conn, "kiosk-1")
    assert (await Agent(nexhb, "kiosk-1", devices.new_token()).send(datetime.now(UTC))).status == 401
    await leave_hash(conn, "kiosk-2", token_hash(devices.new_token()))
    too_long = Agent(nexhb, "kiosk-2", 73 * "a")  # bcrypt would not take it, and NexMDM never gave one
    assert (await too_long.send(datetime.now(UTC))).status == 401


# ---- what it costs ----------------------------------------------------------------------------------------------


class Bench:
    """An adoption whose hashes are tried when the test says so."""

    def __init__(self, database: Database) -> None:
        self.tried: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self._go = threading.Semaphore(0)
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[None] = asyncio.Queue()
        self.adoption = Adoption(database, lambda: datetime.now(UTC), self._check)

    def _check(self, token: bytes, hashed: bytes) -> bool:
        self.threads.add(threading.get_ident())
        self.tried.append((token.decode(), hashed.decode()))
        self._loop.call_soon_threadsafe(self._heard.put_nowait, None)
        assert self._go.acquire(timeout=20)
        if hashed == b"damaged":
            raise ValueError("Invalid salt")
        return token == hashed

    async def next(self) -> tuple[str, str]:
        """The try that is under way."""
        await asyncio.wait_for(self._heard.get(), SOON_S)
        return self.tried[-1]

    def go(self, tries: int = 1) -> None:
        """Let it come to its end."""
        self._go.release(tries)

    def ask(self, token: str, hint: str | None = None, address: str = ADDRESS) -> None:
        """Somebody asks."""
        if self.adoption.admits(devices.hash_token(token), address):
            self.adoption.ask(token, devices.hash_token(token), hint)

    async def is_open(self, token: str) -> bool:
        """Whether he would be told to come again."""
        return await self.adoption.standing(token, devices.hash_token(token)) is Standing.OPEN


@asynccontextmanager
async def working(database: Database) -> AsyncIterator[Bench]:
    """At work."""
    bench = Bench(database)
    task = asyncio.create_task(bench.adoption.run())
    try:
        yield bench
    finally:
        bench.go(1_000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bench.adoption.close()


async def test_who_names_his_device_costs_one_hash_and_does_not_wait_behind_a_stranger(
    conn: Connection, database: Database
) -> None:
    for n in range(4):
        await leave_hash(conn, f"kiosk-{n}", f"token-{n}")
    async with working(database) as bench:
        bench.ask("stranger")
        assert await bench.next() == ("stranger", "token-0")
        bench.ask("token-3", "kiosk-3")
        bench.go()
        assert await bench.next() == ("token-3", "token-3")
        bench.go()
        assert await bench.next() == ("stranger", "token-1")
        assert await conn.fetchval("SELECT count(*) FROM device_tokens") == 1
        assert threading.get_ident() not in bench.threads  # the event loop hashes nothing


async def test_a_token_is_tried_once_however_often_it_is_asked_for(conn: Connection, database: Database) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    await leave_hash(conn, "kiosk-2", "damaged")
    async with working(database) as bench:
        for _ in range(3):
            bench.ask("stranger", "kiosk-1")
        await bench.next()
        bench.ask("stranger", "kiosk-1")
        assert await bench.is_open("stranger")  # his answer is open
        bench.go(10)
        while await bench.is_open("stranger"):
            await asyncio.sleep(0.01)
        assert bench.tried == [("stranger", "token-1"), ("stranger", "token-1"), ("stranger", "damaged")]


async def test_who_waits_is_bounded_by_address_and_in_all(
    conn: Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    monkeypatch.setattr(adopt, "UNHINTED_MOST", 40)
    bench = Bench(database)  # not at work: everybody waits
    for n in range(200):
        bench.ask(f"stranger-{n}")
    held: Any = bench.adoption
    assert len(held._unhinted) == adopt.OF_AN_ADDRESS
    for n in range(200):
        bench.ask(f"other-{n}", address=f"192.0.2.{n}")
    assert len(held._unhinted) == 40
    assert await bench.is_open("one more")  # told to come again all the same, and never 401
    await bench.adoption.close()


async def test_the_body_of_a_stranger_is_not_read_without_his_allowance_and_never_past_a_heartbeat(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four connections with bodies of 2 MB, each parsed whole before the address's allowance was asked for, raised a
    heartbeat's median from 10 to 458 ms while hashes waited."""
    await leave_hash(conn, "kiosk-1", token_hash(devices.new_token()))
    looked_at: list[bytes] = []
    claimed_in = adoption.claimed_in

    def noted(start: bytes) -> str | None:
        looked_at.append(start)
        return claimed_in(start)

    monkeypatch.setattr(adoption, "claimed_in", noted)
    monkeypatch.setattr(adopt, "UNHINTED_MOST", 1_000)
    most = nexhb.settings.server.body_max_bytes
    body = b"[" + b",".join([orjson.dumps(example(datetime.now(UTC), filler="x" * 2_000))] * 1_000) + b"]"
    assert len(body) > 2_000_000
    for n in range(adopt.OF_AN_ADDRESS + 5):
        # No more of the body is sent than may be read, and then nothing: an answer waits for none of the rest.
        sent = body[:most] if n < adopt.OF_AN_ADDRESS else b""
        assert await begin_queue(nexhb, f"stranger-{n}", len(body), sent) == 503
    assert len(looked_at) == adopt.OF_AN_ADDRESS
    assert {len(start) for start in looked_at} == {most}


async def test_a_token_in_line_is_not_read_for_again(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave_hash(conn, "kiosk-1", token_hash(devices.new_token()))
    at_work = asyncio.Event()

    async def fetch_nothing(*_: Any) -> None:
        at_work.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Adoption, "_try", fetch_nothing)
    assert await begin_queue(nexhb, "stranger", 20, 20 * b" ") == 503
    await at_work.wait()
    assert await begin_queue(nexhb, "stranger", 20, b"") == 503


async def begin_queue(nexhb: Nexhb, token: str, size: int, sent: bytes) -> int:
    """The status that a queue of `size` bytes hears of which only `sent` comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(nexhb.url.rpartition(":")[2]))
    head = f"POST /v1/heartbeats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {size}\r\n\r\n"
    writer.write(head.encode() + sent)
    async with asyncio.timeout(SOON_S):
        answer = await reader.readuntil(b"\r\n")
    writer.close()
    return int(answer.split()[1])


@pytest.mark.parametrize(
    ("start", "claimed"),
    [
        (b'{"alias":"a","device_id" : "kiosk-1"}', "kiosk-1"),
        (b'[{"device_id":"kiosk-1"},{"device_id":"other"}', "kiosk-1"),
        (b'{"alias":"a"}\n{"device_id":"\\u043a-1"}\n', "к-1"),
        ('{"device_id":"магазин"}'.encode(), "магазин"),
        (b'{"alias":"\\"device_id\\":\\"no\\"","device_id":"kiosk-1"', "kiosk-1"),
        (b'{"device_id":"cut of', None),
        (b'{"device_id":17}', None),
        (b'{"device_id":"\xff"}', None),
        (b'{"device_id":"\\q"}', None),
        (b'{"device_id":"' + b"x" * 50_000 + b'"}', None),
        (b'"device_id"' * 5_000, None),
        (b'"device_id"' + b" " * 60_000, None),
        (b"", None),
    ],
)
def test_the_device_id_is_found_without_parsing(start: bytes, claimed: str | None) -> None:
    assert adoption.claimed_in(start) == claimed


async def test_a_database_that_is_away_ends_nothing(conn: Connection, database: Database) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    async with working(database) as bench:
        bench.ask("token-1", "kiosk-1")
        await bench.next()
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb adoption'"
        )
        bench.go()
        while not await conn.fetchval("SELECT count(*) FROM device_tokens"):
            bench.ask("token-1", "kiosk-1")  # the device comes again
            bench.go()
            await asyncio.sleep(0.02)


async def test_a_token_adopted_a_moment_ago_is_not_nobodys(conn: Connection, database: Database) -> None:
    """The store's memory may not have heard of it yet, and no hash waits any more: 401 would be wrong."""
    adoption = Adoption(database, lambda: datetime.now(UTC))
    token = devices.new_token()
    number = await leave_hash(conn, "kiosk-1", token_hash(token))
    await conn.execute("UPDATE legacy_tokens SET bcrypt = NULL")
    await conn.execute(
        "INSERT INTO device_tokens (token_sha256, device_no) VALUES ($1, $2)", devices.hash_token(token), number
    )
    assert await adoption.standing(token, devices.hash_token(token)) is Standing.ADOPTED
    assert await adoption.standing("other", devices.hash_token("other")) is Standing.NOBODYS
    await adoption.close()
