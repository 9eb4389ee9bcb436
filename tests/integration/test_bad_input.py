"""Bad requests receive a clear response that names the field, and do not harm the daemon."""

from __future__ import annotations

import asyncio
import gzip
from datetime import datetime

import orjson
import pytest

from nexhb.config import ServerSettings
from tests.conftest import Agent, Nexhb, StartDaemon, example, timestamp
from tests.support.hostile import raw

BATTERY = '{"timestamp_utc":"%s","battery":{"pct":%s}}'
BAD = [
    ("empty body", b"", 400, ""),
    ("not JSON", b"battery=87", 400, ""),
    ("cut off", b'{"timestamp_utc":"2026-11', 400, ""),
    ("a list", b"[]", 422, ""),
    ("a number", b"7", 422, ""),
    ("missing timestamp", b'{"battery":{"pct":87.0}}', 422, "timestamp_utc"),
    ("null timestamp", b'{"timestamp_utc":null}', 422, "timestamp_utc"),
    ("timestamp without zone", b'{"timestamp_utc":"2026-11-24T02:00:00"}', 422, "timestamp_utc"),
    ("timestamp as a number", b'{"timestamp_utc":1795485600}', 422, "timestamp_utc"),
    ("no such day", b'{"timestamp_utc":"2026-02-30T00:00:00Z"}', 422, "timestamp_utc"),
    ("NaN", b'{"timestamp_utc":"@","battery":{"pct":NaN}}', 400, ""),
    ("infinity", b'{"timestamp_utc":"@","battery":{"pct":-Infinity}}', 400, ""),
    ("past every double", b'{"timestamp_utc":"@","battery":{"pct":1e999}}', 422, "battery.pct"),
    ("over 100 %", b'{"timestamp_utc":"@","battery":{"pct":101.0}}', 422, "battery.pct"),
    ("text for a number", b'{"timestamp_utc":"@","battery":{"pct":"87"}}', 422, "battery.pct"),
    ("text for a bool", b'{"timestamp_utc":"@","battery":{"charging":"yes"}}', 422, "battery.charging"),
    ("a list for an object", b'{"timestamp_utc":"@","system":[]}', 422, "system"),
    ("past int32", b'{"timestamp_utc":"@","system":{"uptime_seconds":3000000000}}', 422, "system.uptime_seconds"),
    ("past int64", b'{"timestamp_utc":"@","memory":{"total_ram_mb":99999999999999999999}}', 422, "memory.total_ram_mb"),
    ("past int16", b'{"timestamp_utc":"@","signal_dbm":-99999}', 422, "signal_dbm"),
    ("past float32", b'{"timestamp_utc":"@","battery":{"temperature_c":1e300}}', 422, "battery.temperature_c"),
    ("U+0000", b'{"timestamp_utc":"@","network":{"ssid":"a\\u0000b"}}', 422, "network.ssid"),
    ("lone surrogate", b'{"timestamp_utc":"@","alias":"a\\ud83d"}', 422, "alias"),
    ("not UTF-8", b'{"timestamp_utc":"@","alias":"\xff\xfe"}', 400, ""),
    ("overlong text", b'{"timestamp_utc":"@","alias":"' + b"x" * 201 + b'"}', 422, "alias"),
    ("100,000 deep", b'{"timestamp_utc":"@","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400, ""),
    (
        "Unity's entry",
        b'{"timestamp_utc":"@","app_versions":{"io.unitynodes.unityapp":{"installed":"x"}}}',
        422,
        "app_versions.io.unitynodes.unityapp.installed",
    ),
]


async def unharmed(agent: Agent, now: datetime) -> bool:
    """Check that a valid heartbeat of the same device is stored afterwards."""
    return (await agent.send(now)).status == 200


@pytest.mark.parametrize(("name", "body", "status", "path"), BAD, ids=[name for name, *_ in BAD])
async def test_a_bad_body_is_refused_by_name(
    nexhb: Nexhb, now: datetime, name: str, body: bytes, status: int, path: str
) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(body.replace(b"@", timestamp(now).encode()))
    assert (answer.status, answer.paths) == (status, [path])
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.body["errors"][0]["message"]
    assert await nexhb.rows("SELECT FROM device_heartbeats") == []
    assert await unharmed(agent, now)


async def test_every_bad_field_is_named_at_once(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    answer = await agent.send(now, battery={"pct": 200.0}, system={"uptime_seconds": -5.0}, alias="\0")
    assert answer.paths == ["battery.pct", "system.uptime_seconds", "alias"]


async def test_a_fraction_of_a_percent_is_rounded(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    assert (await agent.send(now, battery={"pct": 87.5})).status == 200
    assert (await nexhb.get(f"/v1/devices/{agent.device_id}"))["battery_pct"] == 88


async def test_a_device_id_other_than_the_tokens_is_counted_and_ignored(nexhb: Nexhb, now: datetime) -> None:
    agent, other_agent = await nexhb.agent(), await nexhb.agent()
    before = await nexhb.metric("nexhb_device_id_mismatch_total")
    for claimed in (other_agent.device_id, 7, "x" * 500, ["a"]):
        answer = await agent.post(orjson.dumps(example(now, device_id=claimed)))
        assert answer.status == 200
    assert await nexhb.metric("nexhb_device_id_mismatch_total") == before + 4
    rows = await nexhb.rows("SELECT DISTINCT device_id FROM heartbeat_history")
    assert [row["device_id"] for row in rows] == [agent.device_id]


async def test_an_invalid_address_is_stored_as_null_and_counted(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    before = await nexhb.metric("nexhb_fields_dropped_total")
    assert (await agent.send(now, network={"ip": "unknown"})).status == 200
    assert (await nexhb.get(f"/v1/devices/{agent.device_id}"))["ip"] is None
    assert await nexhb.metric("nexhb_fields_dropped_total") == before + 1


async def test_ten_megabytes_are_refused_before_they_are_read(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    head = (
        f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 10485760\r\n\r\n"
    )
    assert b" 413 " in await raw(nexhb, head.encode())
    assert await unharmed(agent, now)


async def test_a_chunked_body_over_the_limit_is_refused(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    head = (
        f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    assert b" 413 " in await raw(nexhb, head.encode(), *[chunk] * 4)
    assert await unharmed(agent, now)


async def test_a_body_that_never_ends_times_out(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(server=ServerSettings(port=0, body_timeout_seconds=0.2))
    agent = await nexhb.agent()
    head = (
        f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    assert b" 408 " in await raw(nexhb, head.encode())
    assert await unharmed(agent, now)


async def test_a_body_in_two_pieces_is_one_heartbeat(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    body = b'{"timestamp_utc":"%s"}' % timestamp(now).encode()
    head = (
        f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    assert b" 200 OK" in await raw(nexhb, head.encode(), body[:9], body[9:])


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_a_wrong_content_type_is_refused(nexhb: Nexhb, now: datetime, content_type: str) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(b"{}", **{"Content-Type": content_type})
    assert answer.status == 415
    assert content_type in answer.body["detail"]


async def test_json_with_a_charset_is_accepted(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    body = b'{"timestamp_utc":"%s"}' % timestamp(now).encode()
    assert (await agent.post(body, **{"Content-Type": "application/json; charset=utf-8"})).status == 200


async def test_gzip_is_refused_and_never_decompressed(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    bomb = gzip.compress(b"{" + b" " * 30_000_000 + b"}")
    answer = await agent.post(bomb, **{"Content-Encoding": "gzip"})
    assert answer.status in (413, 415)
    small = await agent.post(gzip.compress(b"{}"), **{"Content-Encoding": "gzip"})
    assert (small.status, small.headers["Accept-Encoding"]) == (415, "identity")
    assert await unharmed(agent, now)


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer nonsense", "Basic abc", "Bearer \xe4", "Bearer " + "x" * 4000]
)
async def test_a_wrong_token_receives_401(nexhb: Nexhb, now: datetime, authorization: str) -> None:
    agent = await nexhb.agent()
    answer = await agent.post(b"{}", Authorization=authorization)
    assert answer.status == 401
    assert "token" in answer.body["detail"]


async def test_pipelined_requests_each_receive_a_response_in_order(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    requests = []
    for body in (
        b'{"timestamp_utc":"%s"}' % timestamp(now).encode(),
        b"{}",
        b'{"timestamp_utc":"%s"}' % timestamp(now).encode(),
    ):
        requests.append(
            f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {agent.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
    last = requests.pop().replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    answers = await raw(nexhb, b"".join(requests) + last)
    assert [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]] == [200, 422, 200]
    assert b'"deduplicated":true' in answers.rpartition(b"HTTP/1.1 ")[2]


async def test_invalid_heartbeats_do_not_affect_others_of_the_same_batch(nexhb: Nexhb, now: datetime) -> None:
    agents = [await nexhb.agent() for _ in range(40)]
    answers = await asyncio.gather(
        *(agent.post(b"{") if number % 2 else agent.send(now) for number, agent in enumerate(agents))
    )
    assert [answer.status for answer in answers] == [200, 400] * 20
    assert len(await nexhb.rows("SELECT FROM device_heartbeats")) == 20
