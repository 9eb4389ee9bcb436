"""POST /v1/heartbeats over real sockets: queues of any length, also such as break off, stand still or are too much."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from nexhb.audit import audit
from nexhb.blocks import BLOCK_BYTES
from nexhb.config import Ingest, Server
from nexhb.db import Connection
from nexhb.http import queues
from nexhb.intake import Intake, Verdict
from nexhb.wire import Heartbeat
from tests.conftest import SOON_S, Agent, Answer, Nexhb, StartDaemon, example

PATH = "/v1/heartbeats"
MANY = Ingest(device_burst=10_000)


def beats(agent: Agent, now: datetime, count: int) -> list[dict[str, Any]]:
    """Heartbeats of different buckets, the newest last."""
    return [example(now - timedelta(seconds=10 * n), device_id=agent.device_id) for n in reversed(range(count))]


def body_of(items: list[Any], form: str) -> bytes:
    return orjson.dumps(items) if form == "array" else b"\n".join(map(orjson.dumps, items)) + b"\n"


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    """Sent in chunks, and without a length."""
    for at in range(0, len(body), size):
        yield body[at : at + size]


async def post(agent: Agent, body: bytes) -> Answer:
    return await agent.post(io.BytesIO(body), PATH)


class Line:
    """A connection on which a body is sent by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, agent: Agent, length: int) -> Line:
        """Once its handler waits for the body."""
        line = cls(*await asyncio.open_connection("127.0.0.1", urlsplit(agent.nexhb.url).port))
        line._writer.write(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\nConnection: close\r\n"
            f"Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        await line._reader.readuntil(b" 100 Continue\r\n\r\n")
        return line

    async def send(self, part: bytes) -> None:
        self._writer.write(part)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, Any]]:
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), SOON_S)).decode().lower()
        body = await self._reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        self.cut()
        return int(head.split()[1]), orjson.loads(body)

    def cut(self) -> None:
        self._writer.transport.abort()


async def written(nexhb: Nexhb, least: int) -> int:
    """How many rows there are, once there are so many."""
    while (count := await rows(nexhb)) < least:
        pass
    return count


async def rows(nexhb: Nexhb) -> int:
    [row] = await nexhb.rows("SELECT count(*) FROM device_heartbeats")
    return int(row[0])


async def check_ledger(conn: Connection, now: datetime) -> None:
    for days in (0, 1):
        if (found := await audit(conn, (now - timedelta(days=days)).date())).written:
            assert found.missing == 0


@pytest.mark.parametrize("form", ["array", "ndjson"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_queue_of_many_blocks_is_written_whole_and_a_second_time_not_at_all(
    start_daemon: StartDaemon, now: datetime, form: str, chunked: bool
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), form)
    assert len(body) > 4 * BLOCK_BYTES
    for expected in ((1_200, 0), (0, 1_200)):
        answer = await agent.post(pieces(body, 50_000) if chunked else io.BytesIO(body), PATH)
        assert (answer.status, answer.body["written"], answer.body["deduplicated"]) == (200, *expected)
    assert await rows(nexhb) == 1_200


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_a_queue_may_come_byte_by_byte(nexhb: Nexhb, now: datetime, form: str) -> None:
    agent = await nexhb.agent()
    body = b"\xef\xbb\xbf" + body_of(beats(agent, now, 2), form)
    line = await Line.to(agent, len(body))
    for byte in body:
        await line.send(bytes((byte,)))
        await asyncio.sleep(0)
    status, answer = await line.answer()
    assert (status, answer["written"], answer["refused"]) == (200, 2, [])


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_bad_ones_are_named_by_their_place_in_the_whole_and_doubles_found_across_blocks(
    start_daemon: StartDaemon, now: datetime, form: str
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    items: list[Any] = beats(agent, now, 1_000)
    bad = {0: 5, 3: {}, 300: {"timestamp_utc": "soon"}, 700: items[700] | {"battery": {"pct": 200}}, 999: "x"}
    for place, item in bad.items():
        items[place] = item
    items += items[1:3]
    answer = await post(agent, body_of(items, form))
    assert [refused["index"] for refused in answer.body["refused"]] == list(bad)
    assert answer.body["refused"][3]["errors"][0]["path"] == "battery.pct"
    assert (answer.body["written"], answer.body["deduplicated"]) == (995, 2)
    assert "refused_not_listed" not in answer.body


async def test_of_very_many_bad_ones_the_first_are_named_and_the_others_counted(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    bad = b'{"timestamp_utc":"2026-11-24T02:00:00Z","battery":{"pct":200}}'
    for body in (b"[" + b"{}," * 2_999 + bad + b"]", (b"{}\n" * 2_999) + bad):
        answer = await post(agent, body)
        assert answer.status == 200
        assert [refused["index"] for refused in answer.body["refused"]] == list(range(queues.REFUSED_LISTED))
        assert answer.body["refused_not_listed"] == 3_000 - queues.REFUSED_LISTED
    assert await nexhb.metric("nexhb_heartbeats_refused_total") >= 6_000


NO_HEARTBEATS: list[tuple[bytes, str]] = [
    (b'{"heartbeats":[{"timestamp_utc":"2026-11-24T02:00:00Z"}]}', "0.timestamp_utc"),
    (b'[{"ts":"2026-11-24T02:00:00Z"},{"ts":"2026-11-24T02:01:00Z"}]', "1.timestamp_utc"),
    (b'[{"battery":{"pct":200},"timestamp_utc":1764000000}]', "0.timestamp_utc"),
    (b'[[{"timestamp_utc":"2026-11-24T02:00:00Z"}]]', "0"),
    (b"[1,null]", "1"), (b'"x"', "0"), (b"garbage\nof lines\n", "1"), (b"heartbeats=x", "0"), (b"\x1f\x8b\x08", "0"),
]  # fmt: skip


async def test_a_body_in_which_nothing_is_a_heartbeat_is_400(start_daemon: StartDaemon) -> None:
    """`{"heartbeats": […]}` was answered 200 with written 0, and a client that deletes at 2xx had lost its queue."""
    nexhb = await start_daemon(ingest=Ingest(device_burst=100_000))
    agent = await nexhb.agent()
    for body, path in NO_HEARTBEATS:
        answer = await post(agent, body)
        assert answer.status == 400, body
        assert "an array of heartbeats" in answer.body["errors"][0]["message"]
        assert path in answer.paths
    many = await post(agent, b"{}\n" * 900)  # in two blocks
    assert (many.status, len(many.paths)) == (400, 1 + 10)
    assert await rows(nexhb) == 0


async def test_one_that_is_understood_is_enough_in_whichever_block_and_though_it_is_refused(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=Ingest(device_burst=100_000))
    agent = await nexhb.agent()
    [good] = beats(agent, now, 1)
    for one, written in ((good, 1), (good | {"battery": {"pct": 200}}, 0), (good | {"system": None}, 1)):
        for place in (0, 1_400):
            items: list[Any] = [{"ts": "x"}] * 1_400
            items.insert(place, one)
            for form in ("array", "ndjson"):
                answer = await post(agent, body_of(items, form))
                assert answer.status == 200, answer.body
                assert len(answer.body["refused"]) == 1_000
                assert answer.body["written"] + answer.body["deduplicated"] == written
    for nothing in (b"[]", b" [ ]\n", b"", b"\n\n"):
        answer = await post(agent, nothing)
        assert (answer.status, answer.body["written"], answer.body["refused"]) == (200, 0, [])


async def test_a_connection_that_breaks_leaves_what_was_committed_and_the_rest_comes_again(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "array")
    line = await Line.to(agent, len(body))
    await line.send(body[: 3 * BLOCK_BYTES])
    kept = await written(nexhb, 100)
    line.cut()
    while not await nexhb.metric('http_request_latency_ms_count{method="POST",route="/v1/heartbeats",status="400"}'):
        pass
    kept = await written(nexhb, kept)
    assert kept < 1_000
    await check_ledger(conn, now)
    answer = await post(agent, body)
    assert answer.body["written"] + answer.body["deduplicated"] == await rows(nexhb) == 1_200
    await check_ledger(conn, now)


async def test_what_is_no_list_any_further_is_400_and_keeps_what_came_before(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "array")
    last = body.rindex(b'{"device_id"')
    for broken, least in ((body[:last] + b"}" + body[last:], 700), (body[:-1], 700), (body[:9_000], 0)):
        answer = await post(agent, broken)
        assert answer.status == 400
        assert ("is kept" in answer.body["detail"]) == (least > 0)
        assert "JSON" in answer.body["errors"][0]["message"]
    assert 700 <= await rows(nexhb) < 1_200
    assert (await agent.send(now)).status == 200


async def test_a_body_that_stands_still_is_408_and_what_it_brought_is_in(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=MANY, server=Server(port=0, body_timeout_seconds=0.5, shutdown_timeout_seconds=2))
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 600), "ndjson")
    line = await Line.to(agent, len(body))
    await line.send(body[: BLOCK_BYTES + 9])
    assert (await line.answer())[0] == 408
    assert await written(nexhb, 100) < 600


async def test_a_body_that_only_drips_is_408(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(server=Server(port=0, body_timeout_seconds=0.5, shutdown_timeout_seconds=2))
    agent = await nexhb.agent()
    line = await Line.to(agent, 10_000_000)

    async def drip() -> None:
        while True:
            await line.send(b" ")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    assert (await line.answer())[0] == 408
    dripping.cancel()


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_the_bound_is_413(start_daemon: StartDaemon, now: datetime, chunked: bool) -> None:
    server = Server(port=0, batch_body_max_bytes=1_000_000, shutdown_timeout_seconds=2)
    nexhb = await start_daemon(ingest=MANY, server=server)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "ndjson")
    answer = await agent.post(pieces(body, 100_000) if chunked else io.BytesIO(body), PATH)
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
    assert await rows(nexhb) < 1_100 if chunked else await rows(nexhb) == 0


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_one_that_is_too_large_is_413_by_its_place(nexhb: Nexhb, now: datetime, form: str) -> None:
    agent = await nexhb.agent()
    items = [*beats(agent, now, 3), {"timestamp_utc": "x" * 2 * BLOCK_BYTES}]
    answer = await post(agent, body_of(items, form))
    assert answer.status == 413
    assert answer.body["errors"][0]["message"].startswith("heartbeat 3 takes more than ")


async def test_a_device_that_sends_more_than_it_may_is_429_in_the_middle(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=Ingest(device_burst=600, device_per_minute=1))
    agent = await nexhb.agent()
    assert (await post(agent, body_of(beats(agent, now, 100), "ndjson"))).status == 200
    answer = await post(agent, body_of(beats(agent, now, 600), "ndjson"))
    assert (answer.status, int(answer.headers["Retry-After"]) > 60) == (429, True)
    assert await written(nexhb, 100) <= 600


@pytest.mark.parametrize(("count", "status"), [(600, 200), (601, 413), (5_000, 413)])
async def test_more_than_may_ever_come_at_once_is_413_which_says_how_many_may(
    start_daemon: StartDaemon, now: datetime, count: int, status: int
) -> None:
    nexhb = await start_daemon(ingest=Ingest(device_burst=600, device_per_minute=1))
    agent = await nexhb.agent()
    answer = await post(agent, body_of(beats(agent, now, count), "ndjson"))
    assert answer.status == status
    assert status == 200 or "at most 600 heartbeats" in answer.body["detail"]


@pytest.mark.parametrize(("room", "count"), [(1, 20), (40, 500)])
async def test_a_queue_larger_than_the_intake_waits_for_its_own_room(
    start_daemon: StartDaemon, now: datetime, room: int, count: int
) -> None:
    nexhb = await start_daemon(ingest=Ingest(queue_items=room))
    agent = await nexhb.agent()
    answer = await post(agent, body_of(beats(agent, now, count), "array"))
    assert (answer.status, answer.body["written"]) == (200, count)


async def test_a_full_intake_is_503_in_the_middle_and_the_whole_may_come_again(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=Ingest(device_burst=2_000, device_per_minute=1, answer_within_seconds=1))
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_500), "array")
    line = await Line.to(agent, len(body))
    await line.send(body[: BLOCK_BYTES + 9])
    await written(nexhb, 100)
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        await line.send(body[BLOCK_BYTES + 9 :])
        status, _ = await line.answer()
    assert status == 503
    while (answer := await post(agent, body)).status == 503:  # until the writer is there again
        pass
    assert answer.body["written"] + answer.body["deduplicated"] == await rows(nexhb) == 1_500
    await check_ledger(conn, now)


async def test_many_at_once_all_get_through_a_small_intake(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(ingest=Ingest(queue_bytes=2**20))
    agents = [await nexhb.agent() for _ in range(12)]
    bodies = [body_of(beats(agent, now, 500), ("array", "ndjson")[n % 2]) for n, agent in enumerate(agents)]

    async def send(agent: Agent, body: bytes) -> int:
        while (answer := await agent.post(pieces(body, 60_000), PATH)).status == 503:
            pass
        return int(answer.body["written"]) + int(answer.body["deduplicated"])

    assert await asyncio.gather(*map(send, agents, bodies)) == [500] * 12
    assert await rows(nexhb) == 6_000


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Bytes of each block that was admitted, and of all that were under way then."""
    found: list[tuple[int, int]] = []
    ask = Intake.ask

    def watched(self: Intake, heartbeats: Sequence[Heartbeat], size: int) -> asyncio.Future[list[Verdict]]:
        future = ask(self, heartbeats, size)
        found.append((size, self.bytes))
        return future

    monkeypatch.setattr(Intake, "ask", watched)
    return found


async def test_two_blocks_are_under_way_at_most_however_slowly_they_are_committed(
    start_daemon: StartDaemon, now: datetime, conn: Connection, asked: list[tuple[int, int]]
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sending = asyncio.create_task(post(agent, body_of(beats(agent, now, 1_200), "array")))
        while len(asked) < 2:
            await asyncio.sleep(0)
        await rows(nexhb)  # time for a third
    assert (await sending).body["written"] == 1_200
    assert max(size for size, _ in asked) <= BLOCK_BYTES
    assert max(all_of for _, all_of in asked) <= 2 * BLOCK_BYTES


async def test_many_at_once_hold_the_less_each(
    start_daemon: StartDaemon, now: datetime, asked: list[tuple[int, int]]
) -> None:
    nexhb = await start_daemon(ingest=Ingest(queue_bytes=2**20))
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 500), "array")
    assert (await post(agent, body)).body["written"] == 500
    assert max(asked)[0] > 200_000
    asked.clear()
    lines = [await Line.to(agent, 100) for _ in range(12)]
    assert (await post(agent, body)).body["deduplicated"] == 500
    assert max(asked)[0] < 2**20 / 12
    for line in lines:
        line.cut()
