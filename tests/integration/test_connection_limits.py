"""Formerly, TLS handshakes were not counted as connections, and each could take a minute. A client that did not read
its responses held its connection, and half a megabyte that it had sent, forever. The daemon now closes both, as it
closes connections with slow heads, and no longer mistakes a body that arrives after its refusal for a slow head."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import orjson
import pytest

from nexhb import daemon
from nexhb.config import ServerSettings
from nexhb.postgres.connections import Connection
from tests.conftest import SOON_S, Nexhb, StartDaemon, example
from tests.support.hostile import HEAD, SHORT, connect, ended
from tests.tls import certificate

HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_handshakes_count_as_connections_and_the_oldest_is_cut(start_daemon: StartDaemon, tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "x")
    tls = {"tls_cert_file": cert_file, "tls_key_file": key_file, "connections_max": 10}
    nexhb = await start_daemon(server=ServerSettings(**(SHORT.model_dump() | tls)))
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(connect(nexhb)) for _ in range(30)]
        for _, writer in lines[:5]:
            writer.write(b"\x16\x03\x01\x02\x00\x01")  # half of a ClientHello
        assert await ended(lines[0][0]) == b""
        assert await ended(lines[19][0]) == b""
        assert not lines[29][0].at_eof()


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_an_incomplete_handshake_is_cut(start_daemon: StartDaemon, tmp_path: Path, sent: bytes) -> None:
    cert_file, key_file = certificate(tmp_path, "x")
    tls = {"tls_cert_file": cert_file, "tls_key_file": key_file}
    nexhb = await start_daemon(server=ServerSettings(**(SHORT.model_dump() | tls)))
    async with connect(nexhb) as (reader, writer):
        writer.write(sent)
        assert await ended(reader) == b""


async def test_a_stopping_daemon_cuts_incomplete_handshakes(nexhb: Nexhb, tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "x")
    server = ServerSettings(port=0, shutdown_timeout_seconds=2, tls_cert_file=cert_file, tls_key_file=key_file)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(daemon.running(nexhb.settings.model_copy(update={"server": server})))
        async with connect(replace(nexhb, url=running.url)) as (reader, writer):
            writer.write(b"\x16\x03\x01\x02\x00\x01")  # half of a ClientHello
            # Connections are accepted in their order: after this response, the first one is accepted.
            async with nexhb.http.get(f"{running.url}/healthz", ssl=False) as response:
                assert response.status == 200
            await stack.aclose()
            assert await ended(reader) == b""
    assert await nexhb.metric('nexhb_connections_cut_total{reason="stopping"}') >= 1


async def test_a_client_hello_in_pieces_and_a_request_right_after_it_are_served(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    cert_file, key_file = certificate(tmp_path, "x")
    server = ServerSettings(port=0, shutdown_timeout_seconds=2, tls_cert_file=cert_file, tls_key_file=key_file)
    nexhb = await start_daemon(server=server)
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE

    async def call() -> bytes:
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = anything.wrap_bio(came, goes)
        async with connect(nexhb) as (reader, writer):
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            hello = goes.read()
            for start in range(0, len(hello), 100):
                writer.write(hello[start : start + 100])
                await asyncio.sleep(0)
            while True:
                came.write(await reader.read(65536))
                try:
                    tls.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                break
            tls.write(HEALTHZ)
            writer.write(goes.read())  # one write sends the end of the handshake and the request
            while True:
                came.write(await reader.read(65536))
                try:
                    return tls.read()
                except ssl.SSLWantReadError:
                    continue

    for answer in await asyncio.gather(*(call() for _ in range(50))):
        assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_a_client_that_does_not_read_its_responses_is_cut(start_daemon: StartDaemon) -> None:
    nexhb = await start_daemon(server=SHORT)
    loop = asyncio.get_running_loop()
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        greedy.setblocking(False)
        await loop.sock_connect(greedy, ("127.0.0.1", int(nexhb.url.rpartition(":")[2])))

        async def ask_for_ever() -> None:
            while True:
                await loop.sock_sendall(greedy, HEALTHZ * 100)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(ask_for_ever(), SOON_S)
    assert await nexhb.metric('nexhb_connections_cut_total{reason="not_read"}') == 1


async def test_a_body_that_arrives_after_its_refusal_is_not_a_slow_head(
    start_daemon: StartDaemon, conn: Connection, now: datetime
) -> None:
    nexhb = await start_daemon(server=SHORT)
    body = orjson.dumps(example(now))
    async with connect(nexhb) as (reader, writer):
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        assert b"401" in await reader.readuntil(b"}")
        writer.write(body)
        await asyncio.sleep(1.5)  # longer than the time limit of a head
        writer.write(HEALTHZ)
        assert b"200 OK" in await reader.readuntil(b'"}')
