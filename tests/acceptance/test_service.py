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

from nexhb import db, devices
from tests.conftest import ADMIN_KEY, SOON_S, example
from tests.proxy import Proxy
from tests.tls import anything, certificate, served_name

Message = dict[str, str]
WITHIN_S = 40.0  # for what takes a second on a machine that is not busy


class Manager:
    """The end of the notify socket that systemd would hold."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.heard: list[Message] = []
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(self.address)
        self._end.setblocking(False)

    async def next(self, within_s: float = WITHIN_S) -> Message:
        """The next message. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            text = (await asyncio.get_running_loop().sock_recv(self._end, 65536)).decode()
        message = dict(line.split("=", 1) for line in text.splitlines())
        self.heard.append(message)
        return message

    async def until(self, *fields: str, status: str = "") -> Message:
        """The next message with these fields and that text in its status."""
        deadline = time.monotonic() + WITHIN_S
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                message = await self.next(left)
                if message.keys() >= set(fields) and status in message.get("STATUS", ""):
                    return message
        raise AssertionError(f"no {fields} with {status!r}, but {self.heard[-9:]}")

    def close(self) -> None:
        """Leave."""
        self._end.close()


@dataclass
class Service:
    """One process, and what it said."""

    process: asyncio.subprocess.Process
    log: list[dict[str, Any]] = field(default_factory=list)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Its log, line by line, until it ends."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with suppress(ValueError):
                self.log.append(json.loads(line))
                self._came.set()

    async def event(self, name: str) -> dict[str, Any]:
        """The first line of that event."""
        async with asyncio.timeout(WITHIN_S):
            while not (found := [line for line in self.log if line.get("event") == name]):
                self._came.clear()
                await self._came.wait()
        return found[0]

    async def ended(self) -> int:
        """Its exit code."""
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
    """A service manager that listens."""
    found = Manager(tmp_path)
    yield found
    found.close()


@pytest.fixture
async def start(database: db.Database, tmp_path: Path, manager: Manager) -> AsyncIterator[Start]:
    """Start `nexhb serve`, or a variant of it, on the test's database; settings by their names in the environment."""
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
async def token(database: db.Database) -> str:
    """Of a device."""
    async with database.connected(application="test") as conn:
        return await devices.add(conn, "kiosk-1", None)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps no connection."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


async def beat(http: aiohttp.ClientSession, url: str, token: str, made_at: datetime) -> tuple[int, dict[str, Any]]:
    """One heartbeat."""
    headers = {"Authorization": f"Bearer {token}"}
    async with http.post(f"{url}/v1/heartbeat", json=example(made_at), headers=headers) as response:
        return response.status, await response.json()


async def metric(http: aiohttp.ClientSession, url: str, name: str) -> float:
    """The metric of whoever answers there."""
    async with http.get(f"{url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def test_the_manager_hears_of_the_start_the_life_a_reload_and_the_stop(
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
    assert sum("READY" in message for message in manager.heard) == 2


async def test_a_start_that_waits_for_its_database_asks_for_time_again_and_again(
    start: Start, manager: Manager
) -> None:
    service = await start("quick", NEXHB_DATABASE__URL="postgresql://127.0.0.1:1/none")
    await manager.until("STATUS", status="Starting: the database")
    for _ in range(3):
        assert await manager.until("EXTEND_TIMEOUT_USEC") == {"EXTEND_TIMEOUT_USEC": "30000000"}
    service.process.send_signal(signal.SIGTERM)
    await manager.until("STOPPING")
    assert await service.ended() == 0
    assert not any("READY" in message or "WATCHDOG" in message for message in manager.heard)


async def test_a_writer_that_waits_for_an_absent_database_is_alive(
    start: Start, manager: Manager, database: db.Database
) -> None:
    async with Proxy(database.dsn).serving() as proxy:
        await start("quick", NEXHB_DATABASE__URL=proxy.dsn, WATCHDOG_USEC=1_500_000)
        await manager.until("READY")
        proxy.refusing = True
        while "NOT READY" not in (await manager.until("WATCHDOG"))["STATUS"]:
            proxy.cut()  # again: a line that was being made at the first cut would live on
        for _ in range(9):  # over 4 s, and it may be silent for 3
            await manager.until("WATCHDOG", status="NOT READY: The database cannot commit")
        proxy.refusing = False
        await manager.until("WATCHDOG", status="ready; queue 0")


async def test_a_writer_that_hangs_is_not_fed_and_after_the_restart_all_is_well(
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

    async def unfed() -> None:
        """As systemd waits: until no WATCHDOG=1 came for so long."""
        last = time.monotonic()
        while (left := last + 2 - time.monotonic()) > 0:
            with suppress(TimeoutError):
                if "WATCHDOG" in await manager.next(left):
                    last = time.monotonic()

    await asyncio.wait_for(unfed(), WITHIN_S)
    assert "The writer hangs" in manager.heard[-1]["STATUS"]
    hangs = await service.event("writer.hangs")
    assert any("HangsOnce._write" in where for where in hangs["where"])
    service.process.send_signal(signal.SIGTERM)  # WatchdogSignal
    assert await service.ended() == 0

    service = await start("hangs-once", **settings)
    await manager.until("READY")
    url = (await service.event("daemon.started"))["url"]
    status, body = await beat(http, url, token, made)
    assert (status, body["deduplicated"]) == (200, False)
    await manager.until("WATCHDOG", status="ready; queue 0; last commit 20")


async def test_a_reload_swaps_the_certificate_under_open_connections_and_a_broken_one_changes_nothing(
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

    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), ssl=anything())

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


async def test_two_daemons_share_a_port_and_a_database_and_each_answers_for_itself_on_its_own(
    start: Start, manager: Manager, token: str, http: aiohttp.ClientSession
) -> None:
    with socket.socket() as held:  # bound, not listening: the port is ours, and whoever shares may join
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
    async with asyncio.timeout(WITHIN_S):  # the kernel deals connections out by chance
        while 0 in [await metric(http, url, "hb_writes_total") for url in own]:
            status, body = await beat(http, shared, token, first + timedelta(seconds=10 * sent))
            assert (status, body["deduplicated"]) == (200, False)
            sent += 1
    assert sum([await metric(http, url, "hb_writes_total") for url in own]) == sent
    for url in (*own, shared):
        status, body = await beat(http, url, token, first)
        assert (status, body["deduplicated"]) == (200, True)

    third = await start(NEXHB_SERVER__PORT=port)
    assert await third.ended() == 1, "whoever has the port may go: systemd is to try again"
    assert f"server.port {port}" in (await third.event("daemon.not_started"))["error"]
    fourth = await start(NEXHB_SERVER__INSTANCE_PORT=own[0].rpartition(":")[2])
    assert await fourth.ended() == 1
    assert "server.instance_port" in (await fourth.event("daemon.not_started"))["error"]
    services[0].process.send_signal(signal.SIGTERM)
    assert await services[0].ended() == 0
    assert (await beat(http, shared, token, datetime.now(UTC)))[0] == 200
