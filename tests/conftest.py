"""Real parts: one embedded PostgreSQL a session, a database copied from a template for each test, the real daemon on
a free port, and an agent that behaves as wire.md says."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
import uvloop
from pydantic import SecretStr

from nexhb import config, db, devices, embedded, log, migrate
from nexhb import daemon as daemon_module
from nexhb.config import Auth, Ingest, Jobs, Server, Settings
from nexhb.config import Database as DatabaseSettings
from tests import skips

_numbers = itertools.count(1)
ADMIN_KEY = "admin-key-of-the-tests-0123456789"
TEMPLATE = "nexhb_template"
SOON_S = (
    60.0  # for what takes less than a second on a quiet machine: a test waits for an event, and this ends what hangs
)
HANGS_AFTER_S = 300


def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that production runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_itemcollected(item: pytest.Item) -> None:
    """A coroutine that hangs fails with its traceback, and the rest of the suite goes on."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _bounded(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip that is not listed is a failure."""
    return skips.judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file."""
    return skips.judged((yield))


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(HANGS_AFTER_S):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test."""
    for name in (*config.ALIASES, "STATE_DIRECTORY", "NEXHB_CONFIG", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    log.setup("warning")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The DSN of an embedded PostgreSQL that lives as long as the session, or of the server in $TEST_DATABASE_URL."""
    if dsn := os.environ.get("TEST_DATABASE_URL"):
        asyncio.run(_make_template(dsn))
        yield dsn
        return
    folder = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    folder.chmod(0o711)  # as root, PostgreSQL's own user must pass
    server = embedded.start(folder / "data")
    try:
        asyncio.run(_make_template(server.dsn))
        yield server.dsn
    finally:
        server.stop()
        shutil.rmtree(folder)


async def _make_template(dsn: str) -> None:
    conn = await asyncpg.connect(dsn)
    await conn.execute(f"DROP DATABASE IF EXISTS {TEMPLATE}")
    await conn.execute(f"CREATE DATABASE {TEMPLATE}")
    await conn.close()
    conn = await asyncpg.connect(dsn, database=TEMPLATE, server_settings={"timezone": "UTC"})
    await migrate.migrate(conn, datetime.now(UTC))
    await conn.close()


def dsn_of(cluster: str, name: str) -> str:
    """The cluster's DSN with another database."""
    head, _, query = cluster.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture
async def empty_database(cluster: str) -> AsyncIterator[db.Database]:
    """A database without a schema."""
    async for database in _scratch(cluster, "template1"):
        yield database


@pytest.fixture
async def database(cluster: str) -> AsyncIterator[db.Database]:
    """A database with the schema, and nothing in it."""
    async for database in _scratch(cluster, TEMPLATE):
        yield database


async def _scratch(cluster: str, template: str) -> AsyncIterator[db.Database]:
    name = f"test_{next(_numbers)}"
    conn = await asyncpg.connect(cluster)
    try:
        await conn.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield db.Database(dsn_of(cluster, name))
        await conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await conn.close()


@pytest.fixture
async def conn(database: db.Database) -> AsyncIterator[db.Connection]:
    """A connection to the test's database."""
    conn = await database.connect(application="test", lock_timeout="5000")
    yield conn
    conn.terminate()


@dataclass
class Clock:
    """The daemon's clock; a test may set it."""

    fixed: datetime | None = None

    def __call__(self) -> datetime:
        return self.fixed or datetime.now(UTC)


@dataclass
class Nexhb:
    """A running daemon, and how to talk to it."""

    url: str
    settings: Settings
    database: db.Database
    clock: Clock
    http: aiohttp.ClientSession
    running: daemon_module.Running
    _agents: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def get(self, path: str, status: int = 200) -> Any:
        """An operator's question."""
        async with self.http.get(self.url + path, headers={"x-admin": ADMIN_KEY}) as response:
            body = await response.read()
            assert response.status == status, body
            return orjson.loads(body)

    async def agent(self, device_id: str = "") -> Agent:
        """A device of its own with its token."""
        device_id = device_id or f"device-{next(self._agents)}"
        conn = await self.database.connect(application="test agent")
        token = await devices.add(conn, device_id, None)
        await conn.close()
        return Agent(self, device_id, token)

    async def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """What stands in the database."""
        conn = await self.database.connect(application="test rows")
        try:
            found: list[asyncpg.Record] = await conn.fetch(query, *args)
            return found
        finally:
            await conn.close()

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        async with self.http.get(f"{self.url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
            text = await response.text()
        return sum(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        )


def timestamp(moment: datetime, digits: int = 6) -> str:
    """As the agent writes it: `Instant.toString()`."""
    fraction = f"{moment.microsecond:06d}000"[:digits]
    return f"{moment:%Y-%m-%dT%H:%M:%S}{'.' if digits else ''}{fraction}Z"


def shown(moment: datetime) -> str:
    """As nexhb writes it."""
    text: str = orjson.loads(orjson.dumps(moment, option=orjson.OPT_UTC_Z))
    return text


def example(made_at: datetime, **changes: Any) -> dict[str, Any]:
    """wire.md's example, as the agent sends it, made at `made_at`."""
    return {
        "device_id": "0b9c6a52-7c40-4a5e-9c1d-3f3c1c0d7e11",
        "alias": "Store 42 - kiosk 3",
        "app_version": "1.0.9",
        "timestamp_utc": timestamp(made_at),
        "app_versions": {
            "io.unitynodes.unityapp": {"installed": True, "version_name": "2.1.0", "version_code": 210},
            "org.zwanoo.android.speedtest": {"installed": False, "version_code": 0},
        },
        "speedtest_running_signals": {"has_service_notification": False, "foreground_recent_seconds": -1},
        "battery": {"pct": 87.0, "charging": True, "temperature_c": 31.5},
        "system": {
            "uptime_seconds": 1.2345678e7, "android_version": "13", "sdk_int": 33.0, "patch_level": "2025-09-05",
            "build_id": "TP1A.220624.014", "model": "SM-T500", "manufacturer": "samsung",
        },
        "memory": {"total_ram_mb": 2848.0, "avail_ram_mb": 1011.0, "pressure_pct": 64.0},
        "network": {"transport": "wifi", "ssid": "Store-42", "ip": "192.168.1.50"},
        "is_device_owner": True, "power_ok": True, "doze_whitelisted": True, "net_validated": True,
        "queue_depth": 0, "monitored_foreground_recent_s": 12, "unity_process_running": True,
    } | changes  # fmt: skip


@dataclass
class Answer:
    """What a device hears."""

    status: int
    body: dict[str, Any]
    headers: Any

    @property
    def paths(self) -> list[str]:
        """The fields that a refusal names."""
        return [error["path"] for error in self.body.get("errors", [])]


@dataclass
class Agent:
    """A device with its token."""

    nexhb: Nexhb
    device_id: str
    token: str = field(repr=False)

    async def send(self, made_at: datetime, **changes: Any) -> Answer:
        """One heartbeat, as the agent makes it."""
        return await self.post(orjson.dumps(example(made_at, device_id=self.device_id, **changes)))

    async def live(self, made_at: datetime, received_at: datetime | None = None, **changes: Any) -> Answer:
        """The same, received at the moment at which it is made, or at another."""
        clock = self.nexhb.clock
        before, clock.fixed = clock.fixed, received_at or made_at
        try:
            return await self.send(made_at, **changes)
        finally:
            clock.fixed = before

    async def post(self, body: Any, path: str = "/v1/heartbeat", **headers: str) -> Answer:
        """Any body."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"} | headers
        async with self.nexhb.http.post(self.nexhb.url + path, data=body, headers=headers) as response:
            return Answer(response.status, orjson.loads(await response.read()), response.headers)


StartDaemon = Callable[..., Awaitable[Nexhb]]


@pytest.fixture
async def start_daemon(database: db.Database, tmp_path: Path) -> AsyncIterator[StartDaemon]:
    """Start a daemon on the test's database; sections of the settings as arguments. Several may run at once."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Any) -> Nexhb:
            url = sections.pop("url", database.dsn)
            clock = Clock(sections.pop("now", None))
            settings = Settings(
                data_dir=tmp_path,
                **{
                    "server": Server(port=0, shutdown_timeout_seconds=2),
                    "database": DatabaseSettings(url=SecretStr(url)),
                    "auth": Auth(admin_key=SecretStr(ADMIN_KEY)),
                    "ingest": Ingest(),
                    "jobs": Jobs(nightly="", reconcile=""),  # a test that wants a job calls it
                }
                | sections,
            )
            running = await stack.enter_async_context(daemon_module.running(settings, clock))
            http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)))
            return Nexhb(running.url, settings, database, clock, http, running)

        yield start


@pytest.fixture
async def nexhb(start_daemon: StartDaemon) -> Nexhb:
    """A running daemon with the defaults."""
    return await start_daemon()


@pytest.fixture
def now() -> datetime:
    """Now, UTC, with no midnight near: that minute is waited out, since a test's heartbeats lie on both sides of it."""
    while (datetime.now(UTC) + timedelta(minutes=1)).time() < clock_time(0, 2):
        time.sleep(1)
    return datetime.now(UTC)
