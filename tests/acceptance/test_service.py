"""The daemon under a service manager: a real process, a real notify socket, real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nexhb.devices import registry
from nexhb.postgres import connections
from tests.conftest import ADMIN_KEY, SOON_S, example
from tests.proxy import Proxy
from tests.tls import accept_any_certificate, certificate, served_name

Message = dict[str, str]
WITHIN_S = 40.0  # timeout of steps that take a second on an idle machine


class Manager:
    """A service manager, which receives messages on the notify socket."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.messages: list[Message] = []
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(self.address)
        self._end.setblocking(False)

    async def next(self, within_s: float = WITHIN_S) -> Message:
        """Return the next message. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            text = (await asyncio.get_running_loop().sock_recv(self._end, 65536)).decode()
        message = dict(line.split("=", 1) for line in text.splitlines())
        self.messages.append(message)
        return message

    async def until(self, *fields: str, status: str = "") -> Message:
        """Return the next message with these fields, and this text in its status."""
        deadline = time.monotonic() + WITHIN_S
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                message = await self.next(left)
                if message.keys() >= set(fields) and status in message.get("STATUS", ""):
                    return message
        raise AssertionError(f"no {fields} with {status!r}, but {self.messages[-9:]}")

    def close(self) -> None:
        """Close the socket."""
        self._end.close()


@dataclass
class Service:
    """A daemon process and its log."""

    process: asyncio.subprocess.Process
    log: list[dict[str, Any]] = field(default_factory=list)
    _new_line: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Read the log, line by line, until the process ends."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with suppress(ValueError):
                self.log.append(json.loads(line))
                self._new_line.set()

    async def event(self, name: str) -> dict[str, Any]:
        """Return the first log line with this event."""
        async with asyncio.timeout(WITHIN_S):
            while not (lines := [line for line in self.log if line.get("event") == name]):
                self._new_line.clear()
                await self._new_line.wait()
        return lines[0]

    async def ended(self) -> int:
        """Return the exit code."""
        return await asyncio.wait_for(self.process.wait(), WITHIN_S)


Start = Callable[..., Awaitable[Service]]


@asynccontextmanager
async def _running(arguments: list[str], environment: dict[str, str]) -> AsyncIterator[Service]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, env=environment, stderr=asyncio.subprocess.PIPE, limit=2**20
    )
    service = Service(process)
    reading = asyncio.create_task(service.read())
    try:
        yield service
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), SOON_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reading


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    """Yield a service manager."""
    manager = Manager(tmp_path)
    yield manager
    manager.close()


@pytest.fixture
async def start(database: connections.Database, tmp_path: Path, manager: Manager) -> AsyncIterator[Start]:
    """Return a function that starts `nexhb serve`, or a variant, on the test's database; its arguments are environment
    variables."""
    async with AsyncExitStack() as stack:

        async def start(variant: str = "", **more: object) -> Service:
            arguments = ["tests.acceptance.service_variants", variant, "serve"] if variant else ["nexhb", "serve"]
            environment = os.environ | {
                "NOTIFY_SOCKET": manager.address, "NEXHB_SERVER__PORT": "0", "NEXHB_DATABASE__URL": database.dsn,
                "NEXHB_AUTH__ADMIN_KEY": ADMIN_KEY, "NEXHB_JOBS__NIGHTLY": "", "NEXHB_JOBS__RECONCILE": "",
                "NEXHB_DATA_DIR": str(tmp_path / "data"),
            }  # fmt: skip
            given = {name: str(value) for name, value in more.items()}
            return await stack.enter_async_context(_running(arguments, environment | given))

        yield start


@pytest.fixture
async def token(database: connections.Database) -> str:
    """Add a device, and return its token."""
    async with database.connected(application="test") as conn:
        return await registry.add(conn, "kiosk-1", None)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client without persistent connections."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


async def beat(http: aiohttp.ClientSession, url: str, token: str, made_at: datetime) -> tuple[int, dict[str, Any]]:
    """Send one heartbeat."""
    headers = {"Authorization": f"Bearer {token}"}
    async with http.post(f"{url}/v1/heartbeat", json=example(made_at), headers=headers) as response:
        return response.status, await response.json()


async def metric(http: aiohttp.ClientSession, url: str, name: str) -> float:
    """Return the metric of the daemon at this URL."""
    async with http.get(f"{url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def test_the_service_manager_is_notified_of_start_watchdog_reload_and_stop(
    start: Start, manager: Manager, token: str, http: aiohttp.ClientSession
) -> None:
    service = await start(WATCHDOG_USEC=1_500_000)
    assert "EXTEND_TIMEOUT_USEC" in await manager.next()
    assert (await manager.until("READY"))["STATUS"] == "ready; queue 0; last commit none"
    url = (await service.event("daemon.started"))["url"]
    assert (await beat(http, url, token, datetime.now(UTC)))[0] == 200
    for _ in range(3):
        await manager.until("WATCHDOG", status="last commit 20")

    before = time.monotonic_ns() // 1000
    service.process.send_signal(signal.SIGHUP)
    reloading = await manager.until("RELOADING")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    await manager.until("READY")

    service.process.send_signal(signal.SIGTERM)
    await manager.until("STOPPING")
    assert await service.ended() == 0
    assert sum("READY" in message for message in manager.messages) == 2


async def test_a_start_that_waits_for_its_database_keeps_extending_its_timeout(start: Start, manager: Manager) -> None:
    service = await start("quick", NEXHB_DATABASE__URL="postgresql://127.0.0.1:1/none")
    await manager.until("STATUS", status="Starting: preparing the database")
    for _ in range(3):
        assert await manager.until("EXTEND_TIMEOUT_USEC") == {"EXTEND_TIMEOUT_USEC": "30000000"}
    service.process.send_signal(signal.SIGTERM)
    await manager.until("STOPPING")
    assert await service.ended() == 0
    assert not any("READY" in message or "WATCHDOG" in message for message in manager.messages)


async def test_a_writer_that_waits_for_an_unreachable_database_keeps_the_watchdog_fed(
    start: Start, manager: Manager, database: connections.Database
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        await start("quick", NEXHB_DATABASE__URL=proxy.dsn, WATCHDOG_USEC=1_500_000)
        await manager.until("READY")
        proxy.refusing = True
        while "NOT READY" not in (await manager.until("WATCHDOG"))["STATUS"]:
            proxy.cut()  # repeatedly, because a connection that is being opened during a cut survives that cut
        for _ in range(9):  # 9 messages take more than 4 s; a writer hangs after 3 s without progress
            await manager.until("WATCHDOG", status="NOT READY: The database cannot commit")
        proxy.refusing = False
        await manager.until("WATCHDOG", status="ready; queue 0")


async def test_a_hanging_writer_stops_the_watchdog_messages_and_a_restart_recovers(
    start: Start, manager: Manager, token: str, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    settings = {
        "WATCHDOG_USEC": 2_000_000, "HUNG_ALREADY": tmp_path / "hung", "NEXHB_INGEST__ANSWER_WITHIN_SECONDS": 1,
    }  # fmt: skip
    service = await start("hangs-once", **settings)
    await manager.until("READY")
    made = datetime.now(UTC)
    url = (await service.event("daemon.started"))["url"]
    assert (await beat(http, url, token, made))[0] == 503

    async def watchdog_expired() -> None:
        """Wait, as systemd does, until no WATCHDOG=1 has arrived for two seconds, the watchdog's timeout."""
        last = time.monotonic()
        while (left := last + 2 - time.monotonic()) > 0:
            with suppress(TimeoutError):
                if "WATCHDOG" in await manager.next(left):
                    last = time.monotonic()

    await asyncio.wait_for(watchdog_expired(), WITHIN_S)
    assert "The writer hangs" in manager.messages[-1]["STATUS"]
    hangs = await service.event("writer.hangs")
    assert any("HangsOnce._settle" in where for where in hangs["where"])
    service.process.send_signal(signal.SIGTERM)  # WatchdogSignal
    assert await service.ended() == 0

    service = await start("hangs-once", **settings)
    await manager.until("READY")
    url = (await service.event("daemon.started"))["url"]
    status, body = await beat(http, url, token, made)
    assert (status, body["deduplicated"]) == (200, False)
    await manager.until("WATCHDOG", status="ready; queue 0; last commit 20")


async def test_a_reload_replaces_the_certificate_keeps_connections_open_and_ignores_an_invalid_certificate(
    start: Start, manager: Manager, tmp_path: Path
) -> None:
    cert_file, key_file = certificate(tmp_path, "first")
    service = await start(NEXHB_SERVER__TLS_CERT_FILE=cert_file, NEXHB_SERVER__TLS_KEY_FILE=key_file)
    await manager.until("READY")
    url = (await service.event("daemon.started"))["url"]
    assert await served_name(url) == "CN=first"

    async def reloaded() -> Message:
        service.process.send_signal(signal.SIGHUP)
        await manager.until("RELOADING")
        return await manager.until("READY")

    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(url.rpartition(":")[2]), ssl=accept_any_certificate()
    )

    async def on_the_open_connection() -> bool:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return b'"ok":true' in await asyncio.wait_for(reader.readuntil(b"}"), WITHIN_S)

    assert await on_the_open_connection()
    certificate(tmp_path, "second")
    assert "certificate" not in (await reloaded())["STATUS"]
    assert await served_name(url) == "CN=second"
    assert await on_the_open_connection()
    certificate(tmp_path, "half of a pair")
    key_file.write_text("not a key")
    assert "the certificate could not be renewed" in (await reloaded())["STATUS"]
    assert await served_name(url) == "CN=second"
    assert await on_the_open_connection()
    certificate(tmp_path, "third")
    assert "certificate" not in (await reloaded())["STATUS"]
    assert await served_name(url) == "CN=third"
    writer.close()


async def test_two_daemons_share_a_port_and_each_responds_for_itself_on_its_instance_port(
    start: Start, manager: Manager, token: str, http: aiohttp.ClientSession
) -> None:
    with socket.socket() as held:  # bound, not listening: reserves the port, which daemons with reuse_port may share
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        sharing = {"NEXHB_SERVER__PORT": port, "NEXHB_SERVER__REUSE_PORT": "true", "NEXHB_SERVER__INSTANCE_PORT": 0}
        services = [await start(**sharing), await start(**sharing)]
        started = [await service.event("daemon.started") for service in services]
    shared, own = f"http://127.0.0.1:{port}", [one["instance_url"] for one in started]
    assert [one["url"] for one in started] == [shared, shared]
    assert len({shared, *own}) == 3

    first = datetime.now(UTC) - timedelta(hours=2)
    sent = 0
    async with asyncio.timeout(WITHIN_S):  # the kernel distributes connections at random
        while 0 in [await metric(http, url, "hb_writes_total") for url in own]:
            status, body = await beat(http, shared, token, first + timedelta(seconds=10 * sent))
            assert (status, body["deduplicated"]) == (200, False)
            sent += 1
    assert sum([await metric(http, url, "hb_writes_total") for url in own]) == sent
    for url in (*own, shared):
        status, body = await beat(http, url, token, first)
        assert (status, body["deduplicated"]) == (200, True)

    third = await start(NEXHB_SERVER__PORT=port)
    assert await third.ended() == 1, "exit code 1 makes systemd retry, because the port may become free"
    assert f"server.port {port}" in (await third.event("daemon.not_started"))["error"]
    fourth = await start(NEXHB_SERVER__INSTANCE_PORT=own[0].rpartition(":")[2])
    assert await fourth.ended() == 1
    assert "server.instance_port" in (await fourth.event("daemon.not_started"))["error"]
    services[0].process.send_signal(signal.SIGTERM)
    assert await services[0].ended() == 0
    assert (await beat(http, shared, token, datetime.now(UTC)))[0] == 200
