"""Fixtures with real components: one embedded PostgreSQL per session, a database copied from a template for each test,
the real daemon on a free port, and an agent that behaves as in wire.md."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
import uvloop
from pydantic import SecretStr

from bench import process
from nexhb import config, log, partitions, preparation
from nexhb import daemon as daemon_module
from nexhb.config import AuthSettings, DatabaseSettings, IngestSettings, JobsSettings, ServerSettings, Settings
from nexhb.devices import registry
from nexhb.jobs import nightly
from nexhb.postgres import connections, embedded, migrate
from tests import skips
from tests.support import forks, known_types
from tests.support.clock import START, Clock

_numbers = itertools.count(1)
ADMIN_KEY = "admin-key-of-the-tests-0123456789"
TEMPLATE = "nexhb_template"
TEMPLATE_WITH_DAYS = "nexhb_template_with_days"  # with the days that a daemon creates at its start
TEMPLATE_OF_NIGHT = "nexhb_template_of_night"  # with all days but the last that a nightly run at NIGHT keeps
NIGHT = datetime(2026, 6, 15, 3, 0, tzinfo=UTC)  # the time at which tests/support/nightly.py runs the job
SOON_S = 60.0  # limit for events that take less than a second on a quiet machine: it only ends a test that hangs
HANGS_AFTER_S = 300
MEMORY = Path("/dev/shm")
ROOM_BYTES = 6 << 30


def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests on the event loop that production uses."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure() -> None:
    """Let bench start its daemons as forks, let asyncpg remember types, and keep the clusters and folders of the tests
    in memory, where fsync and DROP DATABASE cost nothing.

    On a disk a test's database takes 0.5 s to create and drop, in memory 0.05 s. TMPDIR overrides the choice; workers
    inherit it.
    """
    process.launch = forks.popen
    known_types.remember()
    if "TMPDIR" not in os.environ and has_room(MEMORY):
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # make tempfile read TMPDIR again


def has_room(folder: Path) -> bool:
    """Return whether the suite fits into this folder. A container's /dev/shm often has 64 MB."""
    try:
        return shutil.disk_usage(folder).free >= ROOM_BYTES and os.access(folder, os.W_OK)
    except OSError:
        return False


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let a coroutine that hangs fail with its traceback, so that the rest of the suite continues."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _bounded(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure unless its reason is listed."""
    return skips.fail_unlisted_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole file into a failure unless its reason is listed."""
    return skips.fail_unlisted_skip((yield))


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(HANGS_AFTER_S):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's settings from the tests."""
    for name in (*config.ALIASES, "STATE_DIRECTORY", "NEXHB_CONFIG", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    log.setup("warning")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Yield the DSN of an embedded PostgreSQL for the session, or of the server in $TEST_DATABASE_URL."""
    if dsn := os.environ.get("TEST_DATABASE_URL"):
        asyncio.run(_make_template(dsn))
        yield dsn
        return
    folder = Path(tempfile.mkdtemp(prefix="nexhb-test-"))
    folder.chmod(0o711)  # so that PostgreSQL's user can enter it when the tests run as root
    server = embedded.start(folder / "data")
    try:
        asyncio.run(_make_template(server.dsn))
        yield server.dsn
    finally:
        server.stop()
        shutil.rmtree(folder)


async def _make_template(dsn: str) -> None:
    admin = await asyncpg.connect(dsn)
    days = {
        TEMPLATE: [],
        TEMPLATE_WITH_DAYS: preparation.window_days(Settings(), START),
        TEMPLATE_OF_NIGHT: partitions.days_between(
            NIGHT.date() - timedelta(days=90), NIGHT.date() + timedelta(days=13)
        ),
    }
    for name, template_days in days.items():
        original = "template1" if name == TEMPLATE else TEMPLATE
        await admin.execute(f"DROP DATABASE IF EXISTS {name}")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {original}")
        conn = await asyncpg.connect(dsn, database=name, server_settings={"timezone": "UTC"})
        await migrate.migrate(conn, START)
        await partitions.ensure(conn, template_days)
        await conn.close()
    await admin.close()


def dsn_of(cluster: str, name: str) -> str:
    """Return the cluster's DSN with another database."""
    head, _, query = cluster.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture
async def empty_database(cluster: str) -> AsyncIterator[connections.Database]:
    """A database without a schema."""
    async with scratch(cluster, "template1") as database:
        yield database


@pytest.fixture
async def database(cluster: str, request: pytest.FixtureRequest) -> AsyncIterator[connections.Database]:
    """A database with the schema, and no rows. For a daemon or a nightly run the partitions exist, unless the test has
    the fixture `no_days`: creating 22 partitions takes a second of CPU."""
    names = set(request.fixturenames)
    template = TEMPLATE_OF_NIGHT if names & {"house", "bucket"} else TEMPLATE
    if "start_daemon" in names:
        template = TEMPLATE_WITH_DAYS
    if "no_days" in names:
        template = TEMPLATE
    async with scratch(cluster, template) as database:
        yield database


@asynccontextmanager
async def scratch(cluster: str, template: str) -> AsyncIterator[connections.Database]:
    """Create a copy of the template for the block."""
    name = f"test_{next(_numbers)}"
    conn = await asyncpg.connect(cluster)
    try:
        # In memory, copying the files costs half of the CPU of the default, which writes every page to the WAL.
        await conn.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        yield connections.Database(dsn_of(cluster, name))
        await conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await conn.close()


@pytest.fixture
def no_days() -> None:
    """Let the test's database have no partitions."""


@pytest.fixture
async def conn(database: connections.Database) -> AsyncIterator[connections.Connection]:
    """A connection to the test's database."""
    conn = await database.connect(application="test", lock_timeout="5000")
    yield conn
    conn.terminate()


@dataclass
class Nexhb:
    """A running daemon, with methods to send requests to it."""

    url: str
    settings: Settings
    database: connections.Database
    clock: Clock
    http: aiohttp.ClientSession
    running: daemon_module.Running
    _agents: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def get(self, path: str, status: int = 200) -> Any:
        """Send an operator's GET request, check the status, and return the JSON."""
        async with self.http.get(self.url + path, headers={"x-admin": ADMIN_KEY}) as response:
            body = await response.read()
            assert response.status == status, body
            return orjson.loads(body)

    async def agent(self, device_id: str = "") -> Agent:
        """Register a device and return an agent with its token."""
        device_id = device_id or f"device-{next(self._agents)}"
        conn = await self.database.connect(application="test agent")
        token = await registry.add(conn, device_id, None)
        await conn.close()
        return Agent(self, device_id, token)

    async def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Return the rows of a query in the daemon's database."""
        conn = await self.database.connect(application="test rows")
        try:
            found: list[asyncpg.Record] = await conn.fetch(query, *args)
            return found
        finally:
            await conn.close()

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        async with self.http.get(f"{self.url}/metrics", headers={"x-admin": ADMIN_KEY}) as response:
            text = await response.text()
        return sum(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        )


def timestamp(moment: datetime, digits: int = 6) -> str:
    """Format a time as the agent does: `Instant.toString()`."""
    fraction = f"{moment.microsecond:06d}000"[:digits]
    return f"{moment:%Y-%m-%dT%H:%M:%S}{'.' if digits else ''}{fraction}Z"


def shown(moment: datetime) -> str:
    """Format a time as nexhb does."""
    text: str = orjson.loads(orjson.dumps(moment, option=orjson.OPT_UTC_Z))
    return text


def example(made_at: datetime, **changes: Any) -> dict[str, Any]:
    """Return the heartbeat of wire.md's example, made at `made_at`."""
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
    """The response that a device receives."""

    status: int
    body: dict[str, Any]
    headers: Any

    @property
    def paths(self) -> list[str]:
        """Return the fields that a rejection names."""
        return [error["path"] for error in self.body.get("errors", [])]


@dataclass
class Agent:
    """A device with its token."""

    nexhb: Nexhb
    device_id: str
    token: str = field(repr=False)

    async def send(self, made_at: datetime, **changes: Any) -> Answer:
        """Send one heartbeat like the agent's."""
        return await self.post(orjson.dumps(example(made_at, device_id=self.device_id, **changes)))

    async def retry(self, made_at: datetime, **changes: Any) -> Answer:
        """Send a heartbeat again while the answer is 503, as the agent does; return the first other answer."""
        async with asyncio.timeout(SOON_S):
            while (answer := await self.send(made_at, **changes)).status == 503:
                await asyncio.sleep(0.02)
        return answer

    async def live(self, made_at: datetime, received_at: datetime | None = None, **changes: Any) -> Answer:
        """Send a heartbeat that the daemon receives at `received_at`, by default when it is made."""
        clock = self.nexhb.clock
        before, clock.fixed = clock.fixed, received_at or made_at
        try:
            return await self.send(made_at, **changes)
        finally:
            clock.fixed = before

    async def post(self, body: Any, path: str = "/v1/heartbeat", **headers: str) -> Answer:
        """Send any body."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"} | headers
        async with self.nexhb.http.post(self.nexhb.url + path, data=body, headers=headers) as response:
            return Answer(response.status, orjson.loads(await response.read()), response.headers)


StartDaemon = Callable[..., Awaitable[Nexhb]]


@pytest.fixture
async def start_daemon(
    database: connections.Database, now: datetime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartDaemon]:
    """Return a function that starts a daemon on the test's database; its arguments are sections of the settings.
    Several may run at once. Their clock is the tests' clock, which a nightly run may compare with the database's."""
    tests_clock = Clock(now)
    monkeypatch.setattr(nightly, "MAX_CLOCK_DIFFERENCE", timedelta(days=2))
    async with AsyncExitStack() as stack:

        async def start(**sections: Any) -> Nexhb:
            url = sections.pop("url", database.dsn)
            clock = replace(tests_clock, fixed=sections.pop("now", None))
            settings = Settings(
                data_dir=tmp_path,
                **{
                    "server": ServerSettings(port=0, shutdown_timeout_seconds=2),
                    "database": DatabaseSettings(url=SecretStr(url)),
                    "auth": AuthSettings(admin_key=SecretStr(ADMIN_KEY)),
                    "ingest": IngestSettings(),
                    "jobs": JobsSettings(nightly="", reconcile=""),  # a test runs its jobs itself
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
def now(request: pytest.FixtureRequest) -> datetime:
    """Return the time at which the test begins, by the clock of its daemons."""
    return datetime.now(UTC) if "machine_time" in request.fixturenames else START


@pytest.fixture
def machine_time() -> None:
    """Let the clock of the test's daemons be the machine's, by which the other programs of the test work. The test must
    then pass at every time of day."""
