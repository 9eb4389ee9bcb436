"""Debian's nginx and HAProxy with the files of packaging/: heartbeats go to nexhb, all other requests of an agent to
NexMDM, and neither a slow nor an unavailable NexMDM delays a heartbeat."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_network
from pathlib import Path

import aiohttp
import orjson
import pytest
from pydantic import SecretStr

from bench.process import free_port
from nexhb import config
from tests import routing
from tests.conftest import ADMIN_KEY, SOON_S, Agent, Nexhb, StartDaemon, example
from tests.proxy import Relay, Streams
from tests.routing import ENROLMENT, FALLBACK, HAPROXY, MIRROR, NGINX, ROUTE, NexMDM, Proxy, send
from tests.tls import accept_any_certificate

UNKNOWN_TO_NEXHB, UNKNOWN = "a-token-that-only-nexmdm-knows-0123456789abc", "a-token-that-nobody-knows-0123456789abcdef"


@pytest.fixture(
    params=[
        pytest.param("nginx", marks=pytest.mark.skipif(NGINX is None, reason="nginx is not installed")),
        pytest.param("haproxy", marks=pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")),
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    """Return the kind of proxy: each test runs with both."""
    return str(request.param)


@dataclass
class Both:
    """A proxy in front of nexhb and NexMDM, and a device that both know."""

    nexhb: Nexhb
    nexmdm: NexMDM
    proxy: Proxy
    agent: Agent

    def beat(self, made_at: datetime, **changes: object) -> bytes:
        """Return the body of a heartbeat."""
        return orjson.dumps(example(made_at, device_id=self.agent.device_id, **changes))

    def client(self, address: str = "127.0.0.1") -> aiohttp.ClientSession:
        """Return a client with one keep-alive connection, like a device's."""
        connector = aiohttp.TCPConnector(ssl=accept_any_certificate(), limit=1, local_addr=(address, 0))
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=SOON_S))

    async def rows(self) -> int:
        """Return how many heartbeats nexhb has."""
        [(count,)] = await self.nexhb.rows("SELECT count(*) FROM device_heartbeats")
        return int(count)


class Line(Relay):
    """A forwarder between the proxy and nexhb, which can be switched off and on."""

    leads_to = 0

    async def _open(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.leads_to)


Before = Callable[..., Awaitable[Both]]


@pytest.fixture
async def before(start_daemon: StartDaemon, kind: str, tmp_path: Path) -> AsyncIterator[Before]:
    """Return a function that starts a proxy in front of nexhb and NexMDM. `without`: lines to comment out;
    `nexhb_port`: the port of another nexhb."""
    async with AsyncExitStack() as stack:

        async def start(*without: dict[str, str], nexhb_port: int = 0, failures_per_minute: int = 60) -> Both:
            nexhb = await start_daemon(
                server=config.ServerSettings(
                    port=0, shutdown_timeout_seconds=2, trusted_proxies=[ip_network("127.0.0.1/32")]
                ),
                auth=config.AuthSettings(admin_key=SecretStr(ADMIN_KEY), failures_per_minute=failures_per_minute),
            )  # fmt: skip
            agent = await nexhb.agent("kiosk-1")
            old = await stack.enter_async_context(routing.nexmdm(free_port(), [agent.token, UNKNOWN_TO_NEXHB]))
            port = nexhb_port or int(nexhb.url.rpartition(":")[2])
            lines = [one[kind] for one in without]
            proxy = await stack.enter_async_context(routing.proxy(kind, tmp_path / "proxy", port, old.port, *lines))
            return Both(nexhb, old, proxy, agent)

        yield start


async def test_heartbeats_go_to_nexhb_and_all_other_requests_to_nexmdm(before: Before, now: datetime) -> None:
    both = await before(MIRROR)
    url, token = both.proxy.url, both.agent.token
    queue = [example(now - timedelta(minutes=n), device_id="kiosk-1") for n in range(1, 201)]
    async with both.client() as client:  # one connection for all requests, as an agent keeps its own
        first = await send(client, f"{url}/v1/heartbeat", token, both.beat(now))
        slashed = await send(client, f"{url}//v1/heartbeat", token, both.beat(now - timedelta(hours=5)))
        expecting = await send(client, f"{url}/v1/heartbeat", token, both.beat(now), Expect="100-continue")
        queried = await send(client, f"{url}/v1/heartbeat?source=agent", token, both.beat(now))
        large = await send(client, f"{url}/v1/heartbeat", token, both.beat(now, note=200_000 * "x"))
        packed = await send(
            client, f"{url}/v1/heartbeat", token, gzip.compress(both.beat(now)), **{"Content-Encoding": "gzip"}
        )
        array = await send(client, f"{url}/v1/heartbeats", token, orjson.dumps(queue[:100]))
        lines = b"\n".join(orjson.dumps(one) for one in queue)
        many = await send(
            client,
            f"{url}//v1/heartbeats",
            token,
            lines + 2_000_000 * b"\n",
            **{"Content-Type": "application/x-ndjson"},
        )
    assert (first.status, first.body["deduplicated"]) == (200, False)
    assert (slashed.status, slashed.body["deduplicated"]) == (200, False)
    assert (expecting.status, expecting.body["deduplicated"]) == (200, True)
    # nexhb itself refuses these requests, with its own reason.
    assert [(one.status, one.body["status"]) for one in (queried, large, packed)] == [
        (400, 400),
        (413, 413),
        (415, 415),
    ]
    assert (array.status, array.body["written"]) == (200, 100)
    assert (many.status, many.body["written"], many.body["deduplicated"]) == (200, 100, 100)
    body = both.beat(now - timedelta(hours=6))
    old_style = await both.proxy.raw(
        b"POST /v1/heartbeat HTTP/1.0\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
        % (token.encode(), len(body), body)
    )
    assert old_style.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
    body = both.beat(now - timedelta(hours=7))
    chunked = await both.proxy.raw(
        b"POST /v1/heartbeat HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (token.encode(), len(body), body)
    )
    assert chunked.startswith(b"HTTP/1.1 200")
    assert await both.rows() == 204
    assert both.nexmdm.calls == []
    await all_else_goes_to_nexmdm(both)


async def all_else_goes_to_nexmdm(both: Both) -> None:
    """Send the requests that an agent sends to its base URL, with their bodies, and those of the dashboard."""
    url, token = both.proxy.url, both.agent.token
    upload = bytes(3_000_000)
    calls = [
        ("POST", "/v1/devices/kiosk-1/ack", b'{"correlation_id":"1","status":"OK"}'),
        ("POST", "/v1/register?alias=Store%2042", b"{}"),
        ("POST", "/v1/devices/fcm-token", b'{"fcm_token":"f"}'),
        ("POST", "/v1/apk/installation/update", b"{}"),
        ("GET", "/v1/apk/download/7", b""),
        ("POST", "/v1/remote-exec/ack", b"{}"),
        ("GET", "/v1/settings/wifi", b""),
        ("GET", "/v1/devices?limit=50", b""),
        ("POST", "/v1/action-result", b"{}"),
        ("POST", "/admin/apk/upload", upload),
        ("DELETE", "/v1/devices/kiosk-9", b""),
        ("POST", "/v1/heartbeat-of-another-kind", b"{}"),
    ]
    async with both.client() as client:
        for method, path, body in calls:
            fields = {"Authorization": f"Bearer {token}", "X-Admin": "key", "X-Forwarded-For": "6.6.6.6"}
            async with client.request(
                method, url + path, data=io.BytesIO(body) if body else None, headers=fields
            ) as answer:
                assert answer.status == 200
                got = await answer.read()
            assert got == routing.APK if "download" in path else b"NexMDM" in got
        async with client.ws_connect(f"{url}/ws/stream/device/kiosk-1?token={token}") as line:
            for size in (10, 100_000):
                await line.send_bytes(bytes(size))
                assert await line.receive_bytes() == bytes(size)
    assert [(call.method, call.path, call.body) for call in both.nexmdm.calls[:-1]] == calls
    stream = both.nexmdm.calls[-1]
    assert (stream.path, stream.headers["Upgrade"]) == (f"/ws/stream/device/kiosk-1?token={token}", "websocket")
    for call in both.nexmdm.calls:
        assert call.headers.getall("X-Forwarded-For") == ["127.0.0.1"]  # the client's own header is not passed on
        assert call.headers["X-Forwarded-Proto"] == "https"
        assert call.headers["Authorization" if call is not stream else "Upgrade"]
    assert both.nexmdm.calls[0].headers["X-Admin"] == "key"


async def test_nexmdm_receives_a_copy_and_no_device_waits_for_it(before: Before, now: datetime) -> None:
    """nginx reads no further request of a connection while it sends a copy of the last one. Formerly, while NexMDM
    hung, each heartbeat of a queue waited 10 s for the previous heartbeat."""
    both = await before()
    made = (both.beat(now - timedelta(minutes=n)) for n in itertools.count())
    url, token, old = f"{both.proxy.url}/v1/heartbeat", both.agent.token, both.nexmdm
    async with both.client() as client:
        sent = [*(next(made) for _ in range(4)), both.beat(now - timedelta(hours=9), note=60_000 * "x")]
        for body in sent:
            assert (await send(client, url, token, body)).status == 200
        await old.until(lambda: len(old.calls) == 5)
        assert sorted(call.body for call in old.of("/v1/heartbeat")) == sorted(sent)
        assert {call.headers["Authorization"] for call in old.calls} == {f"Bearer {token}"}
        assert {call.headers["X-Forwarded-For"] for call in old.calls} == {"127.0.0.1"}
        # A queue is not copied.
        assert (await send(client, f"{url}s", token, b"[%b]" % next(made))).body["written"] == 1

        old.hangs = True
        async with asyncio.timeout(SOON_S):
            for _ in range(150):
                assert (await send(client, url, token, next(made))).status == 200
        assert len(old.calls) <= 5 + 64  # further copies are dropped

        await old.stop()
        for _ in range(3):
            assert (await send(client, url, token, next(made))).status == 200
    assert await both.rows() == 159
    if both.proxy.kind == "nginx":
        assert 'limiting connections by zone "nexmdm_copies"' in both.proxy.log.read_text()
    else:
        assert "copies wait for a response" in both.proxy.log.read_text()


async def test_while_nexhb_is_unavailable_devices_keep_their_heartbeats_and_nexmdm_receives_copies(
    before: Before, now: datetime
) -> None:
    async with Line().serving() as line:
        both = await before(nexhb_port=line.port)
        line.leads_to = int(both.nexhb.url.rpartition(":")[2])
        line.make_unreachable()
        beats = [both.beat(now - timedelta(minutes=n)) for n in range(3)]
        for body in beats:  # neither 2xx nor 401: the agent keeps the heartbeat and its credentials
            assert (await both.proxy.send("/v1/heartbeat", both.agent.token, body)).status in (502, 503)
        await both.nexmdm.until(lambda: len(both.nexmdm.calls) == 3)
        line.make_reachable()
        for body in beats:
            answer = await both.proxy.send("/v1/heartbeat", both.agent.token, body)
            assert (answer.status, answer.body["deduplicated"]) == (200, False)
        await both.nexmdm.until(lambda: len(both.nexmdm.calls) == 6)
        assert [call.body for call in both.nexmdm.calls[:3]] == beats


async def test_a_heartbeat_with_a_token_that_nexhb_does_not_know_goes_to_nexmdm(before: Before, now: datetime) -> None:
    both = await before(MIRROR)
    body = both.beat(now, note=60_000 * "x")  # nexhb accepts up to 64 kB
    answer = await both.proxy.send("/v1/heartbeat", UNKNOWN_TO_NEXHB, body)
    assert (answer.status, answer.body["by"]) == (200, "NexMDM")
    [call] = both.nexmdm.calls
    assert (call.method, call.path, call.body) == ("POST", "/v1/heartbeat", body)
    assert call.headers["Authorization"] == f"Bearer {UNKNOWN_TO_NEXHB}"
    assert call.headers["X-Forwarded-For"] == "127.0.0.1"
    assert (await both.proxy.send("/v1/heartbeat", UNKNOWN, body)).status == 401
    assert (await both.proxy.send("/v1/heartbeat", both.agent.token, body)).body["deduplicated"] is False
    assert len(both.nexmdm.calls) == 2
    await both.nexmdm.stop()  # while NexMDM is unavailable, it is not known whether a token is unknown
    assert (await both.proxy.send("/v1/heartbeat", UNKNOWN, body)).status in (502, 503)


async def test_only_heartbeats_move_and_an_operator_can_undo_each_step(before: Before, now: datetime) -> None:
    """The lines are commented out one after the other while the proxy runs, as docs/moving.md describes."""
    both = await before()
    proxy, old, token = both.proxy, both.nexmdm, both.agent.token
    assert proxy.comment_out(MIRROR[proxy.kind])
    await proxy.reload()
    assert (await proxy.send("/v1/heartbeat", token, both.beat(now))).status == 200
    assert (await proxy.send("/v1/heartbeat", UNKNOWN_TO_NEXHB, both.beat(now))).status == 200
    assert len(old.calls) == 1  # the request with the unknown token
    assert proxy.comment_out(FALLBACK[proxy.kind])
    await proxy.reload()
    assert (await proxy.send("/v1/heartbeat", UNKNOWN_TO_NEXHB, both.beat(now))).status == 401
    assert (await proxy.send("/v1/heartbeat", token, both.beat(now - timedelta(hours=1)))).status == 200
    assert (len(old.calls), await both.rows()) == (1, 2)
    assert proxy.uncomment(ENROLMENT[proxy.kind])
    await proxy.reload()
    assert (await proxy.send("/v1/register?alias=a", "", b"", **{"X-Admin": "k"})).body["detail"].endswith("is token).")
    assert len(old.calls) == 1
    assert proxy.comment_out(ROUTE[proxy.kind])
    await proxy.reload()
    assert (await proxy.send("/v1/heartbeat", token, both.beat(now))).body["by"] == "NexMDM"
    assert (len(old.calls), await both.rows()) == (2, 2)


async def test_a_device_that_guesses_tokens_is_limited_by_its_own_address(before: Before, now: datetime) -> None:
    """Rate limits apply by address: without X-Forwarded-For, one device that guesses would block all other devices."""
    both = await before(MIRROR, FALLBACK, failures_per_minute=1)
    url = f"{both.proxy.url}/v1/heartbeat"
    async with both.client("127.0.0.2") as guessing, both.client("127.0.0.3") as other:
        statuses = [
            (await send(guessing, url, UNKNOWN, both.beat(now), **{"X-Forwarded-For": f"6.6.6.{n}"})).status
            for n in range(10)
        ]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert (await send(other, url, UNKNOWN, both.beat(now))).status == 401


async def test_any_other_refusal_of_nexhb_reaches_the_device_as_it_is(before: Before, now: datetime) -> None:
    """The proxy passes on Retry-After, which controls devices, and the reason, which helps people who examine a
    device."""
    statuses = iter((503, 429, 422, 410, 500))

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 %d No\r\nContent-Type: application/problem+json\r\nRetry-After: 7\r\nContent-Length: 17\r\n"
            b"Connection: close\r\n\r\n%b" % (next(statuses), b'{"detail": "why"}')
        )
        await writer.drain()
        await reader.read(60_000)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        both = await before(MIRROR, nexhb_port=server.sockets[0].getsockname()[1])
        for status in (503, 429, 422, 410, 500):
            answer = await both.proxy.send("/v1/heartbeat", both.agent.token, both.beat(now))
            assert (answer.status, answer.body, answer.headers["Retry-After"]) == (status, {"detail": "why"}, "7")
        assert both.nexmdm.calls == []


async def test_no_post_is_sent_twice(before: Before, now: datetime) -> None:
    """The agent itself repeats heartbeats; a proxy that repeated other requests would send acknowledgements twice."""
    got: list[bytes] = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Respond to the first request of a connection, read the second one, and close the connection."""
        for number in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            got.append(await reader.readexactly(length))
            if number == 0 and len(got) == 1:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
            else:
                break
        writer.close()

    server = await asyncio.start_server(break_off, "127.0.0.1", 0)
    async with server:
        both = await before(MIRROR, nexhb_port=server.sockets[0].getsockname()[1])
        async with both.client() as client:
            assert (
                await send(client, f"{both.proxy.url}/v1/heartbeat", both.agent.token, both.beat(now))
            ).status == 200
            for _ in range(2):
                with suppress(aiohttp.ServerDisconnectedError):  # HAProxy disconnects if the connection was reused
                    answer = await send(client, f"{both.proxy.url}/v1/heartbeat", both.agent.token, both.beat(now))
                    assert answer.status in (502, 503)
        assert (len(got), both.nexmdm.calls) == (3, [])
