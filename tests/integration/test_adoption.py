"""A device known to NexMDM only by a bcrypt hash keeps its token; a stranger's token costs little."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from bench.nexmdm import token_hash
from nexhb.devices import registry, store, tokens
from nexhb.http.device_api import adoption
from nexhb.nexmdm import adoption as nexmdm_adoption
from nexhb.nexmdm.adoption import Adoption, TokenStatus
from nexhb.postgres.connections import Connection, Database
from tests.conftest import SOON_S, Agent, Nexhb, StartDaemon, example
from tests.support.clock import Clock
from tests.support.responses import until_answered

ADDRESS = "192.0.2.1"


async def leave_hash(conn: Connection, device_id: str, bcrypt: str) -> int:
    """Add a device that has only a hash, as the import does; return the device's number."""
    number: int = await conn.fetchval("INSERT INTO devices (device_id) VALUES ($1) RETURNING device_no", device_id)
    fingerprint = hashlib.sha256(f"{device_id}{bcrypt}".encode()).digest()
    await conn.execute(
        "INSERT INTO legacy_tokens (device_no, fingerprint, bcrypt, taken_at) VALUES ($1, $2, $3, clock_timestamp())",
        number, fingerprint, bcrypt,
    )  # fmt: skip
    return number


async def waiting(conn: Connection) -> int:
    """Return how many hashes wait for their token."""
    return int(await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE bcrypt IS NOT NULL"))


# ---- over HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claims", ["itself", "another", "nothing"])
async def test_a_device_keeps_its_token_and_never_receives_401(nexhb: Nexhb, conn: Connection, claims: str) -> None:
    for n in range(3):
        await leave_hash(conn, f"other-{n}", token_hash(tokens.new_token()))
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    body = example(nexhb.clock(), device_id={"itself": "kiosk-1", "another": "other-1", "nothing": None}[claims])
    answer, before = await until_answered(lambda: agent.post(orjson.dumps(body)))
    assert (answer.status, before) == (200, {503})
    assert await conn.fetchval("SELECT token_sha256 FROM device_tokens") == tokens.hash_token(token)
    assert (
        await conn.fetchval("SELECT count(*) FROM legacy_tokens WHERE adopted_at IS NOT NULL AND bcrypt IS NULL") == 1
    )
    assert await waiting(conn) == 3
    assert await conn.fetchval("SELECT device_id FROM heartbeat_history") == "kiosk-1"


async def test_a_device_that_replays_a_queue_is_adopted_too(nexhb: Nexhb, conn: Connection) -> None:
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    body = orjson.dumps(example(nexhb.clock(), device_id="kiosk-1")) + b"\n"
    answer, _ = await until_answered(
        lambda: agent.post(2 * body, "/v1/heartbeats", **{"Content-Type": "application/x-ndjson"})
    )
    assert (answer.status, answer.body["written"]) == (200, 1)


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_device_with_a_queue_too_long_to_be_read_is_adopted_too(
    nexhb: Nexhb, conn: Connection, chunked: bool
) -> None:
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    agent = Agent(nexhb, "kiosk-1", token)
    beat = orjson.dumps(example(nexhb.clock(), filler="x" * 50_000)) + b"\n"
    beats = 40 * [beat]  # 2 MB

    async def pieces() -> AsyncIterator[bytes]:
        for each in beats:
            yield each

    answer, before = await until_answered(
        lambda: agent.post(pieces() if chunked else io.BytesIO(b"".join(beats)), "/v1/heartbeats")
    )
    assert (answer.status, before) == (200, {503})


async def test_every_daemon_knows_an_adopted_device(start_daemon: StartDaemon, conn: Connection) -> None:
    one, other = await start_daemon(), await start_daemon()
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await until_answered(lambda: Agent(one, "kiosk-1", token).send(one.clock()))
    answer, before = await until_answered(lambda: Agent(other, "kiosk-1", token).send(other.clock()))
    assert (answer.status, before) == (200, set())


async def test_a_revoked_device_receives_410(nexhb: Nexhb, conn: Connection) -> None:
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await registry.revoke(conn, "kiosk-1", nexhb.clock())
    answer, before = await until_answered(lambda: Agent(nexhb, "kiosk-1", token).send(nexhb.clock()))
    assert (answer.status, before) == (410, {503})


@pytest.mark.parametrize("has_sent", [True, False])
async def test_a_readmitted_device_is_adopted_whether_it_sent_while_revoked_or_not(
    nexhb: Nexhb, conn: Connection, has_sent: bool
) -> None:
    token = tokens.new_token()
    await leave_hash(conn, "kiosk-1", token_hash(token))
    await registry.revoke(conn, "kiosk-1", nexhb.clock())
    agent = Agent(nexhb, "kiosk-1", token)
    if has_sent:
        answer, _ = await until_answered(lambda: agent.send(nexhb.clock()))
        assert answer.status == 410
    # The device has one token: a token that nexhb knows, or the token that its hash waits for.
    assert await registry.readmit(conn, "kiosk-1") == registry.Readmitted(was_revoked=True, tokens=1)
    async with asyncio.timeout(SOON_S):
        while (await agent.send(nexhb.clock())).status != 200:
            pass


async def test_a_stranger_receives_401_after_every_hash_was_checked_and_later_at_once(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        await leave_hash(conn, f"kiosk-{n}", token_hash(tokens.new_token()))
    stranger = Agent(nexhb, "kiosk-1", tokens.new_token())
    answer, before = await until_answered(lambda: stranger.send(nexhb.clock()))
    assert (answer.status, before) == (401, {503})
    assert (await stranger.send(nexhb.clock())).status == 401
    assert await waiting(conn) == 5
    # The new hash may be that of the stranger's token. The token is checked again once nexhb no longer remembers it as
    # unknown.
    monkeypatch.setattr(store, "MISS_TTL_S", 0.0)
    await leave_hash(conn, "new", token_hash(stranger.token))
    answer, before = await until_answered(lambda: stranger.send(nexhb.clock()))
    assert (answer.status, before) == (200, {503})


async def test_without_waiting_hashes_an_unknown_token_receives_401_at_once(nexhb: Nexhb, conn: Connection) -> None:
    await leave_hash(conn, "kiosk-1", token_hash(tokens.new_token()))
    await registry.rotate(conn, "kiosk-1")
    assert (await Agent(nexhb, "kiosk-1", tokens.new_token()).send(nexhb.clock())).status == 401
    await leave_hash(conn, "kiosk-2", token_hash(tokens.new_token()))
    too_long = Agent(nexhb, "kiosk-2", 73 * "a")  # bcrypt rejects a token of this length, and NexMDM never issued one
    assert (await too_long.send(nexhb.clock())).status == 401


# ---- limits -----------------------------------------------------------------------------------------------------


class Bench:
    """An adoption whose checks of hashes end when the test lets them."""

    def __init__(self, database: Database) -> None:
        self.tried: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self._go = threading.Semaphore(0)
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[None] = asyncio.Queue()
        self.adoption = Adoption(database, Clock(), self._check)

    def _check(self, token: bytes, hashed: bytes) -> bool:
        self.threads.add(threading.get_ident())
        self.tried.append((token.decode(), hashed.decode()))
        self._loop.call_soon_threadsafe(self._heard.put_nowait, None)
        assert self._go.acquire(timeout=SOON_S)
        if hashed == b"damaged":
            raise ValueError("Invalid salt")
        return token == hashed

    async def next(self) -> tuple[str, str]:
        """Wait for the next check to begin; return its token and hash."""
        await asyncio.wait_for(self._heard.get(), SOON_S)
        return self.tried[-1]

    def go(self, tries: int = 1) -> None:
        """Let this number of checks end."""
        self._go.release(tries)

    def ask(self, token: str, hint: str | None = None, address: str = ADDRESS) -> None:
        """Enqueue a token as a request from this address does."""
        if self.adoption.may_enqueue(tokens.hash_token(token), address):
            self.adoption.enqueue(token, tokens.hash_token(token), hint)

    async def is_open(self, token: str) -> bool:
        """Return whether the token is still pending."""
        return await self.adoption.status(token, tokens.hash_token(token)) is TokenStatus.PENDING


@asynccontextmanager
async def working(database: Database) -> AsyncIterator[Bench]:
    """Provide a running adoption."""
    bench = Bench(database)
    task = asyncio.create_task(bench.adoption.run())
    try:
        yield bench
    finally:
        bench.go(1_000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bench.adoption.close()


async def test_a_token_with_a_hint_costs_one_check_and_does_not_wait_for_a_strangers(
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
        assert threading.get_ident() not in bench.threads  # no check runs in the event loop's thread


async def test_a_token_is_checked_once_however_often_it_is_enqueued(conn: Connection, database: Database) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    await leave_hash(conn, "kiosk-2", "damaged")
    async with working(database) as bench:
        for _ in range(3):
            bench.ask("stranger", "kiosk-1")
        await bench.next()
        bench.ask("stranger", "kiosk-1")
        assert await bench.is_open("stranger")  # the result is still pending
        bench.go(10)
        while await bench.is_open("stranger"):
            await asyncio.sleep(0.01)
        assert bench.tried == [("stranger", "token-1"), ("stranger", "token-1"), ("stranger", "damaged")]


async def test_the_number_of_waiting_tokens_is_limited_by_address_and_in_all(
    conn: Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    monkeypatch.setattr(nexmdm_adoption, "MAX_UNHINTED", 40)
    bench = Bench(database)  # the adoption is not running, so that every token waits
    for n in range(200):
        bench.ask(f"stranger-{n}")
    held: Any = bench.adoption
    assert len(held._unhinted) == nexmdm_adoption.ADDRESS_PER_MINUTE
    for n in range(200):
        bench.ask(f"other-{n}", address=f"192.0.2.{n}")
    assert len(held._unhinted) == 40
    assert await bench.is_open("one more")  # even a token beyond the limit receives 503, never 401
    await bench.adoption.close()


async def test_a_strangers_body_is_read_only_within_the_rate_limit_and_never_beyond_a_heartbeat(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, bodies of 2 MB on four connections were parsed whole before the address's rate limit was checked. While
    hashes waited, this raised the median of a heartbeat's response time from 10 to 458 ms."""
    await leave_hash(conn, "kiosk-1", token_hash(tokens.new_token()))
    looked_at: list[bytes] = []
    claimed_in = adoption.claimed_in

    def noted(start: bytes) -> str | None:
        looked_at.append(start)
        return claimed_in(start)

    monkeypatch.setattr(adoption, "claimed_in", noted)
    monkeypatch.setattr(nexmdm_adoption, "MAX_UNHINTED", 1_000)
    most = nexhb.settings.server.body_max_bytes
    body = b"[" + b",".join([orjson.dumps(example(nexhb.clock(), filler="x" * 2_000))] * 1_000) + b"]"
    assert len(body) > 2_000_000
    for n in range(nexmdm_adoption.ADDRESS_PER_MINUTE + 5):
        # Only as much of the body is sent as may be read: the response must not wait for the rest.
        sent = body[:most] if n < nexmdm_adoption.ADDRESS_PER_MINUTE else b""
        assert await begin_queue(nexhb, f"stranger-{n}", len(body), sent) == 503
    assert len(looked_at) == nexmdm_adoption.ADDRESS_PER_MINUTE
    assert {len(start) for start in looked_at} == {most}


async def test_no_body_is_read_for_a_token_that_is_already_queued(
    nexhb: Nexhb, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave_hash(conn, "kiosk-1", token_hash(tokens.new_token()))
    at_work = asyncio.Event()

    async def fetch_nothing(*_: Any) -> None:
        at_work.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Adoption, "_check_hashes", fetch_nothing)
    assert await begin_queue(nexhb, "stranger", 20, 20 * b" ") == 503
    await at_work.wait()
    assert await begin_queue(nexhb, "stranger", 20, b"") == 503


async def begin_queue(nexhb: Nexhb, token: str, size: int, sent: bytes) -> int:
    """Start to send a queue of `size` bytes of which only `sent` arrives; return the status of the response."""
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
def test_the_claimed_device_id_is_read_without_parsing_the_body(start: bytes, claimed: str | None) -> None:
    assert adoption.claimed_in(start) == claimed


async def test_an_unavailable_database_does_not_end_the_adoption(conn: Connection, database: Database) -> None:
    await leave_hash(conn, "kiosk-1", "token-1")
    async with working(database) as bench:
        bench.ask("token-1", "kiosk-1")
        await bench.next()
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nexhb adoption'"
        )
        bench.go()
        while not await conn.fetchval("SELECT count(*) FROM device_tokens"):
            bench.ask("token-1", "kiosk-1")  # the device retries
            bench.go()
            await asyncio.sleep(0.02)


async def test_a_token_that_was_just_adopted_is_not_unknown(conn: Connection, database: Database) -> None:
    """Right after the adoption, no hash waits any more, but the token store may not have been notified yet: 401 would
    be wrong."""
    adoption = Adoption(database, Clock())
    token = tokens.new_token()
    number = await leave_hash(conn, "kiosk-1", token_hash(token))
    await conn.execute("UPDATE legacy_tokens SET bcrypt = NULL")
    await conn.execute(
        "INSERT INTO device_tokens (token_sha256, device_no) VALUES ($1, $2)", tokens.hash_token(token), number
    )
    assert await adoption.status(token, tokens.hash_token(token)) is TokenStatus.ADOPTED
    assert await adoption.status("other", tokens.hash_token("other")) is TokenStatus.UNKNOWN
    await adoption.close()
