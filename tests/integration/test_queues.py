"""POST /v1/heartbeats over real sockets with queues of any length, including incomplete, stalled and too large ones."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest

from nexhb.audit import audit
from nexhb.config import IngestSettings, ServerSettings
from nexhb.heartbeat import Heartbeat
from nexhb.http.device_api import queues
from nexhb.ingest.block_splitter import BLOCK_BYTES
from nexhb.ingest.intake import Intake, Verdict
from nexhb.postgres.connections import Connection
from tests.conftest import Agent, Answer, Nexhb, StartDaemon, example
from tests.support.queue_connection import RawConnection

PATH = "/v1/heartbeats"
MANY = IngestSettings(device_burst=10_000)


def beats(agent: Agent, now: datetime, count: int) -> list[dict[str, Any]]:
    """Return heartbeats of different buckets, newest last."""
    return [example(now - timedelta(seconds=10 * n), device_id=agent.device_id) for n in reversed(range(count))]


def body_of(items: list[Any], form: str) -> bytes:
    return orjson.dumps(items) if form == "array" else b"\n".join(map(orjson.dumps, items)) + b"\n"


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    """Yield the body in chunks, so that it is sent without a Content-Length."""
    for at in range(0, len(body), size):
        yield body[at : at + size]


async def post(agent: Agent, body: bytes) -> Answer:
    return await agent.post(io.BytesIO(body), PATH)


async def written(nexhb: Nexhb, expected: int) -> int:
    """Wait until there are at least `expected` rows, and return their number."""
    while (count := await rows(nexhb)) < expected:
        pass
    return count


async def rows(nexhb: Nexhb) -> int:
    [row] = await nexhb.rows("SELECT count(*) FROM device_heartbeats")
    return int(row[0])


async def check_ledger(conn: Connection, now: datetime) -> None:
    for days in (0, 1):
        if (counts := await audit(conn, (now - timedelta(days=days)).date())).written:
            assert counts.missing == 0


@pytest.mark.parametrize("form", ["array", "ndjson"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_queue_of_many_blocks_is_written_completely_and_only_once(
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
async def test_a_queue_may_arrive_byte_by_byte(nexhb: Nexhb, now: datetime, form: str) -> None:
    agent = await nexhb.agent()
    body = b"\xef\xbb\xbf" + body_of(beats(agent, now, 2), form)
    connection = await RawConnection.to(agent, len(body))
    for byte in body:
        await connection.send(bytes((byte,)))
        await asyncio.sleep(0)
    status, answer = await connection.answer()
    assert (status, answer["written"], answer["refused"]) == (200, 2, [])


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_bad_items_are_named_by_their_index_in_the_queue_and_duplicates_are_found_across_blocks(
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


async def test_the_first_of_very_many_bad_items_are_named_and_the_others_counted(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    bad = b'{"timestamp_utc":"2026-11-24T02:00:00Z","battery":{"pct":200}}'
    for body in (b"[" + b"{}," * 2_999 + bad + b"]", (b"{}\n" * 2_999) + bad):
        answer = await post(agent, body)
        assert answer.status == 200
        assert [refused["index"] for refused in answer.body["refused"]] == list(range(queues.MAX_REFUSED_LISTED))
        assert answer.body["refused_not_listed"] == 3_000 - queues.MAX_REFUSED_LISTED
    assert await nexhb.metric("nexhb_heartbeats_refused_total") >= 6_000


NO_HEARTBEATS: list[tuple[bytes, str]] = [
    (b'{"heartbeats":[{"timestamp_utc":"2026-11-24T02:00:00Z"}]}', "0.timestamp_utc"),
    (b'[{"ts":"2026-11-24T02:00:00Z"},{"ts":"2026-11-24T02:01:00Z"}]', "1.timestamp_utc"),
    (b'[{"battery":{"pct":200},"timestamp_utc":1764000000}]', "0.timestamp_utc"),
    (b'[[{"timestamp_utc":"2026-11-24T02:00:00Z"}]]', "0"),
    (b"[1,null]", "1"), (b'"x"', "0"), (b"garbage\nof lines\n", "1"), (b"heartbeats=x", "0"), (b"\x1f\x8b\x08", "0"),
]  # fmt: skip


async def test_a_body_without_any_heartbeat_is_400(start_daemon: StartDaemon) -> None:
    """Formerly, `{"heartbeats": […]}` received 200 with written 0, and a client that deletes its queue after a 2xx lost
    the queue."""
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=100_000))
    agent = await nexhb.agent()
    for body, path in NO_HEARTBEATS:
        answer = await post(agent, body)
        assert answer.status == 400, body
        assert "an array of heartbeats" in answer.body["errors"][0]["message"]
        assert path in answer.paths
    many = await post(agent, b"{}\n" * 900)  # in two blocks
    assert (many.status, len(many.paths)) == (400, 1 + 10)
    assert await rows(nexhb) == 0


async def test_one_heartbeat_with_a_timestamp_is_enough_in_any_block_and_even_if_it_is_refused(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=100_000))
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


async def test_after_a_broken_connection_the_committed_blocks_stay_and_the_queue_is_sent_again(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "array")
    connection = await RawConnection.to(agent, len(body))
    await connection.send(body[: 3 * BLOCK_BYTES])
    kept = await written(nexhb, 100)
    connection.cut()
    while not await nexhb.metric('http_request_latency_ms_count{method="POST",route="/v1/heartbeats",status="400"}'):
        pass
    kept = await written(nexhb, kept)
    assert kept < 1_000
    await check_ledger(conn, now)
    answer = await post(agent, body)
    assert answer.body["written"] + answer.body["deduplicated"] == await rows(nexhb) == 1_200
    await check_ledger(conn, now)


async def test_a_list_that_becomes_invalid_is_400_and_the_heartbeats_before_are_stored(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "array")
    last = body.rindex(b'{"device_id"')
    for broken, min_rows in ((body[:last] + b"}" + body[last:], 700), (body[:-1], 700), (body[:9_000], 0)):
        answer = await post(agent, broken)
        assert answer.status == 400
        assert ("are stored" in answer.body["detail"]) == (min_rows > 0)
        assert "JSON" in answer.body["errors"][0]["message"]
    assert 700 <= await rows(nexhb) < 1_200
    assert (await agent.send(now)).status == 200


async def test_a_stalled_body_is_408_and_the_heartbeats_that_arrived_are_stored(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(
        ingest=MANY, server=ServerSettings(port=0, body_timeout_seconds=0.5, shutdown_timeout_seconds=2)
    )
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 600), "ndjson")
    connection = await RawConnection.to(agent, len(body))
    await connection.send(body[: BLOCK_BYTES + 9])
    assert (await connection.answer())[0] == 408
    assert await written(nexhb, 100) < 600


async def test_a_body_that_arrives_too_slowly_is_408(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(server=ServerSettings(port=0, body_timeout_seconds=0.5, shutdown_timeout_seconds=2))
    agent = await nexhb.agent()
    connection = await RawConnection.to(agent, 10_000_000)

    async def drip() -> None:
        while True:
            await connection.send(b" ")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    assert (await connection.answer())[0] == 408
    dripping.cancel()


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_the_limit_is_413(start_daemon: StartDaemon, now: datetime, chunked: bool) -> None:
    server = ServerSettings(port=0, batch_body_max_bytes=1_000_000, shutdown_timeout_seconds=2)
    nexhb = await start_daemon(ingest=MANY, server=server)
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_200), "ndjson")
    answer = await agent.post(pieces(body, 100_000) if chunked else io.BytesIO(body), PATH)
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
    assert await rows(nexhb) < 1_100 if chunked else await rows(nexhb) == 0


@pytest.mark.parametrize("form", ["array", "ndjson"])
async def test_an_item_that_is_too_large_is_413_and_named_by_its_index(nexhb: Nexhb, now: datetime, form: str) -> None:
    agent = await nexhb.agent()
    items = [*beats(agent, now, 3), {"timestamp_utc": "x" * 2 * BLOCK_BYTES}]
    answer = await post(agent, body_of(items, form))
    assert answer.status == 413
    assert answer.body["errors"][0]["message"].startswith("heartbeat 3 takes more than ")


async def test_a_device_that_exceeds_its_rate_within_a_queue_is_429(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=600, device_per_minute=1))
    agent = await nexhb.agent()
    assert (await post(agent, body_of(beats(agent, now, 100), "ndjson"))).status == 200
    answer = await post(agent, body_of(beats(agent, now, 600), "ndjson"))
    assert (answer.status, int(answer.headers["Retry-After"]) > 60) == (429, True)
    assert await written(nexhb, 100) <= 600


@pytest.mark.parametrize(("count", "status"), [(600, 200), (601, 413), (5_000, 413)])
async def test_a_queue_longer_than_the_burst_is_413_with_the_limit(
    start_daemon: StartDaemon, now: datetime, count: int, status: int
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=600, device_per_minute=1))
    agent = await nexhb.agent()
    answer = await post(agent, body_of(beats(agent, now, count), "ndjson"))
    assert answer.status == status
    assert status == 200 or "at most 600 heartbeats" in answer.body["detail"]


@pytest.mark.parametrize(("room", "count"), [(1, 20), (40, 500)])
async def test_a_queue_larger_than_the_intake_waits_for_its_own_blocks(
    start_daemon: StartDaemon, now: datetime, room: int, count: int
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(queue_items=room))
    agent = await nexhb.agent()
    answer = await post(agent, body_of(beats(agent, now, count), "array"))
    assert (answer.status, answer.body["written"]) == (200, count)


async def test_an_intake_that_fills_up_within_a_queue_is_503_and_the_queue_can_be_sent_again(
    start_daemon: StartDaemon, now: datetime, conn: Connection
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(device_burst=2_000, device_per_minute=1, answer_within_seconds=1))
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 1_500), "array")
    connection = await RawConnection.to(agent, len(body))
    await connection.send(body[: BLOCK_BYTES + 9])
    await written(nexhb, 100)
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        await connection.send(body[BLOCK_BYTES + 9 :])
        status, _ = await connection.answer()
    assert status == 503
    while (answer := await post(agent, body)).status == 503:  # until the writer has recovered
        pass
    assert answer.body["written"] + answer.body["deduplicated"] == await rows(nexhb) == 1_500
    await check_ledger(conn, now)


async def test_many_concurrent_queues_are_written_although_the_intake_is_small(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(queue_bytes=2**20))
    agents = [await nexhb.agent() for _ in range(12)]
    bodies = [body_of(beats(agent, now, 500), ("array", "ndjson")[n % 2]) for n, agent in enumerate(agents)]

    async def send(agent: Agent, body: bytes) -> int:
        while (answer := await agent.post(pieces(body, 60_000), PATH)).status == 503:
            pass
        return int(answer.body["written"]) + int(answer.body["deduplicated"])

    assert await asyncio.gather(*map(send, agents, bodies)) == [500] * 12
    assert await rows(nexhb) == 6_000


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the bytes of each admitted block, and of all blocks in progress at that time."""
    blocks: list[tuple[int, int]] = []
    submit = Intake.submit

    def record(self: Intake, heartbeats: Sequence[Heartbeat], size: int) -> asyncio.Future[list[Verdict]]:
        future = submit(self, heartbeats, size)
        blocks.append((size, self.bytes))
        return future

    monkeypatch.setattr(Intake, "submit", record)
    return blocks


async def test_at_most_two_blocks_are_in_progress_however_slowly_they_are_committed(
    start_daemon: StartDaemon, now: datetime, conn: Connection, submitted: list[tuple[int, int]]
) -> None:
    nexhb = await start_daemon(ingest=MANY)
    agent = await nexhb.agent()
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status")
        sending = asyncio.create_task(post(agent, body_of(beats(agent, now, 1_200), "array")))
        while len(submitted) < 2:
            await asyncio.sleep(0)
        await rows(nexhb)  # leaves time for a third block
    assert (await sending).body["written"] == 1_200
    assert max(size for size, _ in submitted) <= BLOCK_BYTES
    assert max(all_of for _, all_of in submitted) <= 2 * BLOCK_BYTES


async def test_each_queue_may_hold_less_of_the_intake_the_more_queues_there_are(
    start_daemon: StartDaemon, now: datetime, submitted: list[tuple[int, int]]
) -> None:
    nexhb = await start_daemon(ingest=IngestSettings(queue_bytes=2**20))
    agent = await nexhb.agent()
    body = body_of(beats(agent, now, 500), "array")
    assert (await post(agent, body)).body["written"] == 500
    assert max(submitted)[0] > 200_000
    submitted.clear()
    connections = [await RawConnection.to(agent, 100) for _ in range(12)]
    assert (await post(agent, body)).body["deduplicated"] == 500
    assert max(submitted)[0] < 2**20 / 12
    for connection in connections:
        connection.cut()
