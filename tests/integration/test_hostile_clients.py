"""Slow and hostile clients are disconnected or refused, and counted, and do not affect healthy devices."""

from __future__ import annotations

import asyncio
import io
import itertools
import ssl
from datetime import datetime, timedelta
from ipaddress import ip_network
from pathlib import Path

import aiohttp
import orjson
import pytest
from pydantic import SecretStr

from nexhb import config
from nexhb.errors import ConfigError
from nexhb.http.transport import http_connection, tls
from nexhb.http.transport.http_connection import HttpConnection
from tests.conftest import ADMIN_KEY, Nexhb, StartDaemon, example
from tests.support.hostile import HEAD, SHORT, connect, ended
from tests.tls import certificate, served_name


@pytest.mark.parametrize("sent", [b"", b"P", HEAD, HEAD + b"X-A: "])
async def test_a_client_that_sends_half_a_head_is_cut(start_daemon: StartDaemon, sent: bytes) -> None:
    nexhb = await start_daemon(server=SHORT)
    async with connect(nexhb) as (reader, writer):
        writer.write(sent)
        assert await ended(reader) == b""
    assert await nexhb.metric('nexhb_connections_cut_total{reason="slow_head"}') >= 1


async def test_a_client_that_sends_its_head_too_slowly_is_cut(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(server=SHORT)
    async with connect(nexhb) as (reader, writer):

        async def drip() -> None:
            for byte in HEAD * 100:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await ended(reader) == b""
        dripping.cancel()


async def test_an_incomplete_second_head_is_cut_but_an_idle_connection_is_not(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(server=SHORT)
    agent = await nexhb.agent()
    async with connect(nexhb) as (reader, writer), connect(nexhb) as (quiet, quiet_writer):
        for each in (writer, quiet_writer):
            each.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        for answer in (reader, quiet):
            await answer.readuntil(b"}")
        writer.write(b"GET /healthz HT")
        assert await ended(reader) == b""
        await asyncio.sleep(1)
        quiet_writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await quiet.readuntil(b"}")
        assert (await agent.send(now)).status == 200


async def test_a_long_request_is_not_mistaken_for_a_slow_head(start_daemon: StartDaemon, now: datetime) -> None:
    nexhb = await start_daemon(server=SHORT)
    agent = await nexhb.agent()
    body = orjson.dumps(example(now, device_id=agent.device_id))
    async with connect(nexhb) as (reader, writer):
        head = f"Authorization: Bearer {agent.token}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        writer.write(HEAD + head)
        for start in range(0, len(body), len(body) // 10 + 1):  # ten pieces, 2 s altogether
            writer.write(body[start : start + len(body) // 10 + 1])
            await asyncio.sleep(0.2)
        assert b"200 OK" in await reader.readuntil(b"}")
        await asyncio.sleep(1)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b'"}')


async def test_above_the_limit_the_oldest_connection_without_a_key_is_cut_and_devices_stay(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(server=config.ServerSettings(port=0, shutdown_timeout_seconds=2, connections_max=10))
    agent = await nexhb.agent()
    assert (await agent.send(now)).status == 200  # the agent's connection is authenticated, and stays open
    idle = [await asyncio.open_connection("127.0.0.1", int(nexhb.url.rpartition(":")[2])) for _ in range(30)]
    assert await ended(idle[0][0]) == b""
    assert await ended(idle[19][0]) == b""
    for number in range(5):
        assert (await agent.send(now + timedelta(seconds=20 * number - 100))).status == 200
    assert await nexhb.metric('nexhb_connections_cut_total{reason="too_many"}') >= 20
    assert not idle[29][0].at_eof()
    for _, writer in idle:
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: +5\r\n\r\nhello",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(500)) + b"\r\n",
        b"POST /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        HEAD + b"X : y\r\n\r\n",
        HEAD + b"X\x00: y\r\n\r\n",
        HEAD + b" folded: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n",
    ],
)
async def test_invalid_http_receives_a_problem_and_the_connection_is_closed(nexhb: Nexhb, request_: bytes) -> None:
    async with connect(nexhb) as (reader, writer):
        writer.write(request_)
        answer = await ended(reader)
    status = int(answer.split(b" ", 2)[1])
    assert 400 <= status < 500
    assert b"application/problem+json" in answer
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["status"] == status
    assert (await nexhb.get("/healthz"))["ok"]


async def test_pipelined_requests_are_answered_in_order(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    requests = b""
    for number in range(20):
        body = orjson.dumps(example(now - timedelta(seconds=20 * number), device_id=agent.device_id))
        key = f"Authorization: Bearer {agent.token}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        requests += HEAD + key + body
    async with connect(nexhb) as (reader, writer):
        writer.write(requests + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = await ended(reader)
    assert answers.count(b"200 OK") == 21
    assert answers.count(b'"deduplicated":false') == 20


# ---- rate limits ------------------------------------------------------------------------------------------------


async def test_a_kiosk_in_a_tight_loop_receives_429_and_the_others_do_not_notice(
    start_daemon: StartDaemon, now: datetime
) -> None:
    # One permit per minute: on a slow machine, too, 510 requests are more than the burst and what is added meanwhile.
    nexhb = await start_daemon(ingest=config.IngestSettings(device_burst=500, device_per_minute=1))
    mad, sane = await nexhb.agent(), await nexhb.agent()
    answers = [await mad.send(now) for _ in range(510)]
    statuses = [answer.status for answer in answers]
    assert set(statuses[:500]) == {200}
    assert statuses[-1] == 429
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert (await sane.send(now)).status == 200
    assert await nexhb.metric('nexhb_rate_limited_total{kind="device"}') >= 1


async def test_a_full_queue_may_be_sent_twice_in_one_request_or_in_five_hundred(nexhb: Nexhb, now: datetime) -> None:
    agent = await nexhb.agent()
    queue = [example(now - timedelta(minutes=n), device_id=agent.device_id) for n in range(500)]
    for _ in range(2):
        assert (await agent.post(orjson.dumps(queue), "/v1/heartbeats")).status == 200
    assert (await agent.send(now)).status == 200
    # 499 permits are left, and two are added each second: the exact number depends on the speed of the machine.
    assert (await agent.post(orjson.dumps(queue + queue[:100]), "/v1/heartbeats")).status == 429


async def test_a_client_that_guesses_keys_receives_429_and_a_shop_with_the_same_address_is_served(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(auth=config.AuthSettings(admin_key=nexhb_key(), failures_per_minute=2))
    agent = await nexhb.agent()
    guesser = await nexhb.agent()
    guesser.token = "not a token"
    statuses = [(await guesser.send(now)).status for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert (await agent.send(now)).status == 200
    await nexhb.get("/v1/fleet")
    async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers={"x-admin": "wrong"}) as response:
        assert response.status == 429
    # A new token that the daemon has just been notified of is in memory, and not limited either.
    assert (await (await nexhb.agent()).send(now)).status in (200, 429)


def nexhb_key() -> SecretStr:
    """Return the tests' admin key as a setting."""
    return SecretStr(ADMIN_KEY)


@pytest.mark.parametrize("trusted", [[], ["127.0.0.0/8"]])
async def test_only_a_trusted_proxy_may_state_the_clients_address(
    start_daemon: StartDaemon, now: datetime, trusted: list[str]
) -> None:
    nexhb = await start_daemon(
        server=config.ServerSettings(
            port=0, shutdown_timeout_seconds=2, trusted_proxies=[ip_network(one) for one in trusted]
        ),
        auth=config.AuthSettings(admin_key=nexhb_key(), failures_per_minute=1),
    )
    statuses = []
    for number in range(8):
        headers = {"x-admin": "wrong", "X-Forwarded-For": f"6.6.6.6, 10.0.0.{number}"}
        async with nexhb.http.get(f"{nexhb.url}/v1/fleet", headers=headers) as response:
            statuses.append(response.status)
    assert statuses == ([401] * 8 if trusted else [401] * 5 + [429] * 3)


# ---- overload ---------------------------------------------------------------------------------------------------


async def test_a_full_queue_slows_the_fleet_down_and_an_empty_one_does_not(
    start_daemon: StartDaemon, now: datetime
) -> None:
    nexhb = await start_daemon(ingest=config.IngestSettings(queue_items=20))
    agents = [await nexhb.agent() for _ in range(40)]
    conn = await nexhb.database.connect(application="a heavy lock")
    async with conn.transaction():
        await conn.execute("LOCK TABLE device_last_status IN ACCESS EXCLUSIVE MODE")
        sending = [asyncio.create_task(agent.send(now)) for agent in agents]
        while sum(one.done() for one in sending) < 20:  # the number of refused heartbeats
            await asyncio.sleep(0.01)
    await conn.close()
    answers = [await one for one in sending]
    refused = [answer for answer in answers if answer.status == 503]
    accepted = [answer.body["next_heartbeat_seconds"] for answer in answers if answer.status == 200]
    assert len(accepted) == 20
    assert all(2 <= int(answer.headers["Retry-After"]) <= 12 for answer in refused)
    assert max(accepted) > 60
    assert (await agents[0].send(now + timedelta(seconds=11))).body["next_heartbeat_seconds"] == 60
    assert await nexhb.metric("nexhb_next_heartbeat_seconds") == 60


# ---- TLS --------------------------------------------------------------------------------------------------------


async def test_the_daemon_serves_https_and_reloads_its_certificate_while_it_runs(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    cert_file, key_file = certificate(tmp_path, "first")
    server = config.ServerSettings(port=0, shutdown_timeout_seconds=2, tls_cert_file=cert_file, tls_key_file=key_file)
    nexhb = await start_daemon(server=server)
    assert nexhb.url.startswith("https://")
    async with nexhb.http.get(f"{nexhb.url}/healthz", ssl=False) as response:
        assert response.status == 200
    assert await served_name(nexhb.url) == "CN=first"
    certificate(tmp_path, "second")
    assert nexhb.running.renew_tls()
    assert await served_name(nexhb.url) == "CN=second"
    key_file.write_text("not a key")
    assert not nexhb.running.renew_tls()
    assert await served_name(nexhb.url) == "CN=second"


async def test_plain_http_to_a_tls_port_and_old_tls_are_refused(start_daemon: StartDaemon, tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "only")
    server = config.ServerSettings(port=0, shutdown_timeout_seconds=2, tls_cert_file=cert_file, tls_key_file=key_file)
    nexhb = await start_daemon(server=server)
    async with connect(nexhb) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in await ended(reader)
    made = tls.context(server)
    assert made is not None
    assert made.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_missing_certificate_stops_the_start_with_the_name_of_the_setting(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "x")
    cert_file.unlink()
    with pytest.raises(ConfigError, match=r"server\.tls_cert_file .*not found"):
        tls.context(config.ServerSettings(tls_cert_file=cert_file, tls_key_file=key_file))
    with pytest.raises(ValueError, match="set together"):
        config.ServerSettings(tls_cert_file=cert_file)


async def test_a_device_receives_a_complete_response_over_tls(
    start_daemon: StartDaemon, tmp_path: Path, now: datetime
) -> None:
    cert_file, key_file = certificate(tmp_path, "only")
    server = config.ServerSettings(port=0, shutdown_timeout_seconds=2, tls_cert_file=cert_file, tls_key_file=key_file)
    nexhb = await start_daemon(server=server)
    agent = await nexhb.agent()
    body = orjson.dumps(example(now, device_id=agent.device_id))
    headers = {"Authorization": f"Bearer {agent.token}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(f"{nexhb.url}/v1/heartbeat", data=body, headers=headers, ssl=False) as response:
                assert (await response.json())["ok"]


@pytest.mark.parametrize("path", ["/v1/heartbeats", "/v1/nothing", "/v1/fleet"])
async def test_the_rest_of_an_unknown_senders_body_is_discarded_slowly(
    nexhb: Nexhb, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formerly, such bodies were read at full speed: those of four connections kept the event loop so busy that healthy
    devices waited."""
    came: list[float] = []
    pass_on = HttpConnection._pass_on

    def record(self: HttpConnection, data: bytes) -> None:
        if data:
            came.append(asyncio.get_running_loop().time())
        pass_on(self, data)

    monkeypatch.setattr(http_connection, "SLOW_S", 0.05)
    monkeypatch.setattr(HttpConnection, "_pass_on", record)
    async with connect(nexhb) as (reader, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {2**22}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n")).split()[1] in (b"401", b"404", b"405")
        writer.write(bytes(2**20))
        await ended(reader)
    assert len(came) > 3
    # The first piece of the body may have arrived before the response is sent.
    assert all(later - sooner > 0.04 for sooner, later in itertools.pairwise(came[2:]))


async def test_an_unknown_sender_of_two_megabytes_can_read_the_refusal(nexhb: Nexhb) -> None:
    async with nexhb.http.post(f"{nexhb.url}/v1/heartbeats", data=io.BytesIO(bytes(2_000_000))) as response:
        assert response.status == 401
        assert (await response.json())["detail"]
